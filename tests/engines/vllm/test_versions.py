"""What is asked of every vLLM, those too that cannot run a plan on a CPU."""

from __future__ import annotations

from importlib import import_module

import pytest

from leanmoe.core.errors import LeanMoeError
from leanmoe.core.installed_vllm import OLDEST_ON_CPU, require_vllm
from leanmoe.models.shape import read_shape
from leanmoe.plan import Plan, Rule
from leanmoe.serve.plugin_options import PluginOptions
from leanmoe.serve.vllm import checks, small_steps
from leanmoe.serve.vllm.installation import (
    files_of_vllm,
    known_signatures,
    read_signatures,
    version,
)


def test_its_signatures_are_those_of_the_committed_file() -> None:
    assert read_signatures(files_of_vllm()) == known_signatures()[version()]


def test_small_steps_of_this_vllm_are_as_read() -> None:
    """Its Triton experts do not run here, but what the plugin asks of their code can be asked."""

    functions = import_module(small_steps.FUNCTIONS)
    module, name = checks.TRITON
    assert isinstance(getattr(import_module(module), name), type)
    assert small_steps.passes_over(functions)
    for rows, slots, experts in ((4, 4, 64), (8, 8, 256), (2, 6, 64)):
        assert small_steps.takes_slots_alone(functions, rows, slots, experts)
        assert not small_steps.takes_slots_alone(functions, rows + 1, slots, experts)


def test_a_build_that_chooses_experts_in_its_kernel_is_refused_before_a_model_is_built() -> None:
    from leanmoe.serve.vllm.patch import process_plugin

    if tuple(int(part) for part in version().split(".")[:2]) >= OLDEST_ON_CPU:
        pytest.skip(f"vLLM {version()} lets a plan choose")
    plan = Plan.uniform(read_shape("reference").fingerprint(), Rule(top_k=6))
    for refuse in (
        lambda: require_vllm(with_plans=True),
        lambda: process_plugin().start(plan, PluginOptions("plan.json")),
    ):
        with pytest.raises(LeanMoeError, match=r"a plan on a CPU needs 0\.30 or newer"):
            refuse()
