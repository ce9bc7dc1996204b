"""A tiny setting of the reference model's own code: seconds on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from reference_model.architecture import DeepseekV3Settings, Qwen3MoeSettings
from reference_model.balance import BATCH_ALPHA
from reference_model.optimiser import OptimiserSettings
from reference_model.train import TrainSettings

TINY_DEEPSEEK = DeepseekV3Settings(
    vocab_size=64,
    hidden=32,
    layers=2,
    dense_intermediate=48,
    experts=16,
    expert_intermediate=16,
    top_k=4,
    groups=4,
    groups_used=2,
    heads=2,
    kv_rank=16,
    qk_nope=8,
    qk_rope=8,
    v_head=16,
    context=32,
)
TINY = TrainSettings(
    tokens=32 * 4 * 16,
    sequences=4,
    log_every=4,
    dev_every=8,
    model=TINY_DEEPSEEK,
    optimiser=OptimiserSettings(learning_rate=5e-3, warmup_tokens=512),
)

TINY_SOFTMAX = replace(
    TINY,
    alpha=BATCH_ALPHA,
    model=Qwen3MoeSettings(
        vocab_size=64,
        hidden=32,
        layers=2,
        experts=16,
        expert_intermediate=16,
        top_k=4,
        heads=2,
        key_value_heads=1,
        head=16,
        context=32,
    ),
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small gain nothing from threads, and on a busy machine wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stream that repeats itself, so that a few steps learn something."""
    folder = tmp_path_factory.mktemp("data")
    period = np.random.default_rng(0).integers(1, 64, 400)
    np.concatenate([period] * 20).astype("<u2").tofile(folder / "train.bin")
    period.astype("<u2").tofile(folder / "dev.bin")
    return folder
