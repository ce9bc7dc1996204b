"""What all tests share: Triton's interpreter, and which tests are slow.

Where there is no GPU, Triton interprets its programs. It wants to know before anything imports it.
An environment with vLLM tests engines alone, which have programs of their own.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available() and find_spec("vllm") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")

ROOT = Path(__file__).parents[1]
SLOW = (
    "tests/bench/test_continuous.py",
    "tests/bench/test_in_process.py",
    "tests/bench/test_over_http.py",
    "tests/benchmarks",
    "tests/cli/test_bench.py",
    "tests/cli/test_predict.py",
    "tests/cli/test_prune.py",
    "tests/conformance",
    "tests/eval/test_harness.py",
    "tests/eval/test_run.py",
    "tests/fuzz",
    "tests/kernels/triton",
    "tests/prune",
    "tests/reference_model",
    "tests/runtime/test_apply.py",
    "tests/routing/test_ranks.py",
    "tests/study",
    "tests/test_examples.py",
    "tests/tune/test_run.py",
)
"""Files and folders that `make check` leaves out: they run whole models, servers, processes, or
Triton's interpreter."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks every test of `SLOW` as slow."""
    for item in items:
        place = item.path.relative_to(ROOT).as_posix()
        if any(place == slow or place.startswith(f"{slow}/") for slow in SLOW):
            item.add_marker(pytest.mark.slow)
