"""What a plugin is asked to do, read from environment variables."""

from __future__ import annotations

from pathlib import Path

import pytest

from leanmoe.core.errors import LeanMoeError
from leanmoe.plan import Fingerprint, Plan, Rule
from leanmoe.serve.plugin_options import LEANMOE, VARIABLES, VLLM, PluginOptions

MODEL = Fingerprint("Model", 1, 1, 8, 2)


def read(engine: str = "vLLM", **values: str) -> PluginOptions | None:
    """The options under LEANMOE_PLAN and these variables, named without LEANMOE_."""
    environ = {f"LEANMOE_{name}": value for name, value in values.items()}
    return PluginOptions.from_environ(engine, {"LEANMOE_PLAN": "plan.json", **environ})


def test_without_a_plan_nothing_is_asked_for_or_refused() -> None:
    assert PluginOptions.from_environ("vLLM", {}) is None
    assert PluginOptions.from_environ("vLLM", {"LEANMOE_BATCH_SCOPE": "world"}) is None
    assert read(PLAN="") is None


def test_what_is_not_set_or_empty_is_the_default() -> None:
    assert read() == PluginOptions("plan.json")
    assert read(DROP="", BATCH_SCOPE="", EXPERTS="", STATISTICS="") == PluginOptions("plan.json")
    assert read(BATCH_SCOPE="rank", STATISTICS="0") == PluginOptions("plan.json")


def test_every_variable_of_the_plugin_is_read() -> None:
    options = read(DROP="prompt, other", BATCH_SCOPE="all", EXPERTS="leanmoe", STATISTICS="1")
    assert options == PluginOptions("plan.json", ("prompt", "other"), True, True, LEANMOE)
    assert read(EXPERTS="vllm") == PluginOptions("plan.json", experts=VLLM)
    assert len(VARIABLES) == 7, "the two others are not the plugin's"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("BATCH_SCOPE", "world", "LEANMOE_BATCH_SCOPE is 'world': it must be rank or all"),
        ("EXPERTS", "fast", "LEANMOE_EXPERTS is 'fast': it must be vllm or leanmoe"),
        ("STATISTICS", "yes", "LEANMOE_STATISTICS is 'yes': it must be 0 or 1"),
    ],
)
def test_other_values_are_refused_by_name(name: str, value: str, message: str) -> None:
    with pytest.raises(LeanMoeError, match=message):
        read(**{name: value})


def test_what_an_engine_cannot_do_is_refused() -> None:
    with pytest.raises(LeanMoeError, match="LEANMOE_BATCH_SCOPE is 'all': SGLang cannot"):
        read("SGLang", BATCH_SCOPE="all")
    with pytest.raises(LeanMoeError, match="leanmoe's kernels cannot run in SGLang"):
        read("SGLang", EXPERTS="leanmoe")


def test_a_plan_is_read_less_what_may_be_left_out(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    Plan(MODEL, prompt=(Rule(top_k=1),)).save(path)
    with pytest.raises(LeanMoeError, match="LEANMOE_DROP=prompt runs the bands without them"):
        PluginOptions(str(path)).load_plan("vLLM")
    assert PluginOptions(str(path), ("prompt",)).load_plan("vLLM") == Plan(MODEL)
