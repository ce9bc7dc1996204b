"""SGLang's count of real rows, made where SGLang would not count, on stand-ins of its modules."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest

from leanmoe.core.errors import LeanMoeError
from leanmoe.plan import Band, Plan, Rule
from leanmoe.serve.sglang import padding
from tests.serve.sglang.test_patch import MODEL

RUNNER = "sglang.srt.model_executor.runner.base_runner"


def stock() -> bool:
    return False


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    """The module that defines SGLang's function, and one that imported it."""
    names = ["sglang", "sglang.srt", "sglang.srt.model_executor", padding.HOME, RUNNER]
    made = {name: ModuleType(name) for name in names}
    for name in (padding.HOME, RUNNER):
        made[name].enable_num_token_non_padded = stock  # type: ignore[attr-defined]
    for name in [each for each in sys.modules if each.startswith("sglang")]:
        monkeypatch.delitem(sys.modules, name)
    for name, module in made.items():
        monkeypatch.setitem(sys.modules, name, module)
    return made


def test_all_modules_that_imported_the_function_count(modules: dict[str, ModuleType]) -> None:
    assert padding.make_count() is stock
    for name in (padding.HOME, RUNNER):
        assert modules[name].enable_num_token_non_padded()
    padding.check_counts()
    modules[RUNNER].enable_num_token_non_padded = stock  # type: ignore[attr-defined]
    with pytest.raises(LeanMoeError, match="base_runner asks another enable_num_token_non_padded"):
        padding.check_counts()


def test_an_sglang_without_the_function_is_refused(modules: dict[str, ModuleType]) -> None:
    del modules[padding.HOME].enable_num_token_non_padded
    with pytest.raises(LeanMoeError, match=r"has no sglang.*enable_num_token_non_padded"):
        padding.make_count()


def test_only_rules_that_depend_on_real_rows_need_the_count() -> None:
    assert not padding.needs_count(Plan.uniform(MODEL, Rule(top_k=2)))
    assert not padding.needs_count(Plan.uniform(MODEL, Rule(threshold=0.3)))
    assert padding.needs_count(Plan.uniform(MODEL, Rule(guaranteed=2)))
    assert padding.needs_count(Plan.banded(MODEL, (Band(8, (Rule(top_k=2),) * 2),)))


@pytest.mark.parametrize(
    ("attn_cp_size", "attn_dp_size", "scattered", "wanted"),
    [
        (1, 1, False, None),
        (1, 2, True, None),
        (1, 2, False, "unset --enable-dp-attention"),
        (2, 1, False, "set --attn-cp-size 1"),
    ],
)
def test_rows_that_are_no_prefix_of_a_step_are_not_counted(
    monkeypatch: pytest.MonkeyPatch, attn_cp_size: int, attn_dp_size: int, scattered: bool,
    wanted: str | None,
) -> None:  # fmt: skip
    parallel = SimpleNamespace(attn_cp_size=attn_cp_size, attn_dp_size=attn_dp_size)
    utils, context = ModuleType("utils"), ModuleType("context")
    utils.is_moe_input_scattered_across_dp_ranks = lambda: scattered  # type: ignore[attr-defined]
    context.get_parallel = lambda: parallel  # type: ignore[attr-defined]
    for name in ("sglang", "sglang.srt", "sglang.srt.layers", "sglang.srt.layers.moe"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "sglang.srt.layers.moe.utils", utils)
    monkeypatch.setitem(sys.modules, "sglang.srt.runtime_context", context)
    reason = padding.not_counted_reason()
    assert (reason is None) == (wanted is None)
    assert wanted is None or wanted in str(reason)
