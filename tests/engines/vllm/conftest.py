"""vLLM itself on a CPU, the reference model in float32; skipped where it is not installed.

`make test-engines` installs it in an environment of its own and runs these.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

REASON = "vllm is not installed here: make test-engines runs these in an environment that has it"
SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_MLA_DISABLE": "1",  # its MLA kernels take no heads as small as the reference model's
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if find_spec("vllm") is None:
        for item in items:
            if item.path.parent == Path(__file__).parent:
                item.add_marker(pytest.mark.skip(reason=REASON))


@pytest.fixture(autouse=True, scope="session")
def _settings() -> None:
    os.environ |= SETTINGS
    os.environ.pop("LEANMOE_PLAN", None)


@pytest.fixture
def load() -> Iterator[Any]:
    """Loads the reference model in vLLM under a plan, or as trained; at most one at a time."""
    import gc

    from leanmoe.engines.vllm import hook
    from leanmoe.reference import path

    def start(plan: Any = None, **settings: Any) -> Any:
        from vllm import LLM

        if plan is None:
            hook.stop()
        else:
            hook.use(plan, "of the test", is_counted=True)
        return LLM(
            model=str(path()),
            **{
                "dtype": "float32",
                "enforce_eager": True,
                "max_model_len": 256,
                "max_num_seqs": 16,
                "enable_prefix_caching": False,
                "seed": 0,
                **settings,
            },
        )

    yield start
    hook.stop()
    gc.collect()
