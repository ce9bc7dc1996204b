"""A pruned checkpoint of the reference model in vLLM itself, without any of our code at work."""

from __future__ import annotations

import gc
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from leanmoe.models.reference import path
from leanmoe.models.shape import read_shape
from leanmoe.prune.checkpoint import read_source, write_pruned
from leanmoe.prune.criteria import best_experts

pytestmark = pytest.mark.skipif(
    find_spec("vllm") is None, reason="vllm is not installed here: it needs its own environment"
)
SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_MLA_DISABLE": "1",  # its MLA kernels take no heads as small as the reference model's
}
KEPT = 40
PROMPTS = (
    "The window class of an application is registered with",
    "It was a cold evening, and the old man",
    "A generator function returns",
)
REPLY = 8
NEAR = 2e-3
"""Of log-probabilities in float32: sums in another order, over seven layers."""


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference model with 40 of 64 experts a layer, 5 in each of its 8 groups."""
    folder = tmp_path_factory.mktemp("pruned") / "checkpoint"
    shape = read_shape("reference")
    scores = np.random.default_rng(0).random((len(shape.moe_layers), shape.experts))
    write_pruned(read_source(path()), best_experts(scores, KEPT, shape), folder, {}, lambda _: None)
    return folder


@pytest.fixture
def in_vllm(pruned: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.delenv("LEANMOE_PLAN", raising=False)
    for name, value in SETTINGS.items():
        monkeypatch.setenv(name, value)
    from vllm import LLM

    model = LLM(
        model=str(pruned),
        dtype="float32",
        enforce_eager=True,
        max_model_len=128,
        max_num_seqs=4,
        enable_prefix_caching=False,
        seed=0,
        # vllm-cpu's own operators get DeepSeek's rotary positions wrong without MLA
        compilation_config={"custom_ops": ["none"]},
    )
    yield model
    del model
    gc.collect()


@torch.inference_mode()
def by_transformers(folder: Path, ids: list[int]) -> torch.Tensor:
    """Log-probabilities [T,V] after each token."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert model.config.n_routed_experts == KEPT
    found: torch.Tensor = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return found


def test_it_generates_what_transformers_does(pruned: Path, in_vllm: Any) -> None:
    from transformers import AutoTokenizer
    from vllm import SamplingParams

    assert in_vllm.llm_engine.model_config.hf_config.n_routed_experts == KEPT
    tokenizer = AutoTokenizer.from_pretrained(pruned)
    prompts = [[tokenizer.bos_token_id, *tokenizer.encode(text)] for text in PROMPTS]
    sampling = SamplingParams(temperature=0, max_tokens=REPLY, ignore_eos=True, logprobs=1)
    outputs = in_vllm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling)
    for ids, output in zip(prompts, outputs, strict=True):
        reply = list(output.outputs[0].token_ids)
        assert len(reply) == REPLY
        wanted_TV = by_transformers(pruned, ids + reply)[len(ids) - 1 : -1]
        for place, token in enumerate(reply):
            given = output.outputs[0].logprobs[place][token].logprob
            assert given == pytest.approx(float(wanted_TV[place, token]), abs=NEAR)
            # The likeliest, or as likely as the likeliest to within rounding.
            assert float(wanted_TV[place].max() - wanted_TV[place, token]) <= NEAR


def test_it_is_another_model_than_the_full_one(pruned: Path) -> None:
    """So that agreement above cannot come from experts that do nothing."""
    from transformers import AutoModelForCausalLM

    ids = torch.tensor([[0, 5, 17, 99, 1234]])
    with torch.inference_mode():
        full = AutoModelForCausalLM.from_pretrained(path(), dtype=torch.float32)(ids).logits
        less = AutoModelForCausalLM.from_pretrained(pruned, dtype=torch.float32)(ids).logits
    assert float((full - less).abs().max()) > 100 * NEAR
