"""vLLM itself on a CPU, the reference model in float32; skipped where it is not installed.

`make test-engines` installs it in an environment of its own and runs these.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from leanmoe.core.errors import LeanMoeError
from leanmoe.core.installed_vllm import check_version, require_vllm

REASON = "vllm is not installed here: make test-engines runs these in an environment that has it"
SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_MLA_DISABLE": "1",  # its MLA kernels take no heads as small as the reference model's
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = [item for item in items if item.path.parent == Path(__file__).parent]
    reason = REASON if find_spec("vllm") is None else _why_no_plan()
    for item in here:
        if reason == REASON or (reason and item.path.name != "test_versions.py"):
            item.add_marker(pytest.mark.skip(reason=reason))


def _why_no_plan() -> str:
    """Why this vLLM is too old to run a plan; empty if it is not."""
    try:
        check_version(require_vllm(with_plans=False).version)
    except LeanMoeError as error:
        return str(error)
    return ""


@pytest.fixture(autouse=True, scope="session")
def _settings() -> None:
    os.environ |= SETTINGS
    os.environ.pop("LEANMOE_PLAN", None)


@pytest.fixture
def log(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> Iterator[pytest.LogCaptureFixture]:
    """What the plugin logs; vLLM's own settings, made at an import or before, pass nothing on."""
    monkeypatch.setenv("VLLM_CONFIGURE_LOGGING", "0")
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    with caplog.at_level("INFO", logger="vllm.leanmoe"):
        yield caplog


@pytest.fixture
def load() -> Iterator[Any]:
    """Loads a model (the reference model) in vLLM under a plan, or as trained; one at a time."""
    from leanmoe.models.reference import path
    from leanmoe.serve.plugin_options import PluginOptions
    from leanmoe.serve.vllm.control_hooks import process_control
    from leanmoe.serve.vllm.patch import process_plugin

    def start(
        plan: Any = None, experts: str | None = None, options: Any = None, **settings: Any
    ) -> Any:
        from vllm import LLM

        _register_kernels_once()
        _shut_down(running)
        process_control().stop()
        if options is not None:  # of a plan with tiers
            process_control().start(options)
        elif plan is None:
            process_plugin().stop()
        else:
            options = PluginOptions(
                "of the test", collect_stats=True, check_rows=True, experts=experts
            )
            process_plugin().start(plan, options)
        llm = LLM(
            **{
                "model": str(path()),
                "dtype": "float32",
                "enforce_eager": True,
                "max_model_len": 256,
                "max_num_seqs": 16,
                "enable_prefix_caching": False,
                "seed": 0,
                # vllm-cpu's own operators get DeepSeek's rotary positions wrong without MLA
                "compilation_config": {"custom_ops": ["none"]},
                **settings,
            },
        )
        running.append(llm)
        return llm

    running: list[Any] = []
    yield start
    _shut_down(running)
    process_control().stop()
    process_plugin().stop()


def _shut_down(running: list[Any]) -> None:
    """Ends an engine before another starts: it leaves what they share when it is collected."""
    import gc

    while running:
        running.pop().llm_engine.engine_core.shutdown()
    gc.collect()


@cache
def _register_kernels_once() -> None:
    """vLLM registers its CPU kernels anew for each engine, and trips over what numba has loaded.

    A service has one engine a process; these tests have many. Versions before 0.31 do not.
    """
    from vllm.platforms.cpu import CpuPlatform

    if not hasattr(CpuPlatform, "register_triton_kernel_overrides"):
        return
    CpuPlatform.register_triton_kernel_overrides()
    CpuPlatform.register_triton_kernel_overrides = classmethod(lambda _: None)
