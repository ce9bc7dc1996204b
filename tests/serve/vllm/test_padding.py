"""Where padding is read from, version by version, with stand-ins of vLLM's steps and runners."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from leanmoe.core.errors import LeanMoeError
from leanmoe.plan import Fingerprint, Plan, Rule
from leanmoe.serve.vllm.layer_routing import VllmLayerRouting
from leanmoe.serve.vllm.padding import PaddingSource, StepPadding, padding_source, rank_share
from tests.serve.stand_ins import Context, FusedTopKRouter, install_context, install_runner

MARKED, SLOTS, NONE = PaddingSource.MARKED, PaddingSource.SLOTS, PaddingSource.NONE
SHARED, ALONE = [Rule(guaranteed=2)], [Rule(threshold=0.5)]


def config(v2: bool = False, context_parallel: int = 1) -> Any:
    parallel = SimpleNamespace(decode_context_parallel_size=context_parallel)
    return SimpleNamespace(use_v2_model_runner=v2, parallel_config=parallel)


@pytest.mark.parametrize(
    ("version", "v2", "has_field", "v1_fills", "v2_fills", "source"),
    [
        ("0.24.0", False, False, False, False, SLOTS),
        ("0.24.0", True, False, False, False, SLOTS),
        ("0.25.0", False, True, False, False, SLOTS),  # the field is there and stays None
        ("0.26.0", False, True, False, True, SLOTS),
        ("0.30.0", False, True, False, True, SLOTS),
        ("0.31.0", False, True, True, True, MARKED),
        ("0.33.0", False, True, True, False, MARKED),
        ("0.26.0", True, True, False, False, SLOTS),  # the field keeps the True of the capture
        ("0.26.0", True, True, False, True, MARKED),
        ("0.33.0", True, True, True, True, MARKED),
    ],
)
def test_the_mask_is_read_where_the_runner_fills_it(
    monkeypatch: pytest.MonkeyPatch, version: str, v2: bool, has_field: bool, v1_fills: bool,
    v2_fills: bool, source: PaddingSource,
) -> None:  # fmt: skip
    install_context(monkeypatch, None)
    install_runner(monkeypatch, has_field, v1_fills, v2_fills)
    assert padding_source(config(v2), SHARED, version) is source


def test_settings_in_which_nothing_says_padding_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install_context(monkeypatch, None)
    install_runner(monkeypatch, v1_fills=False, v2_fills=False)
    with pytest.raises(LeanMoeError, match=r"vLLM 0\.33\.0 .* unset VLLM_MOE_SKIP_PADDING"):
        padding_source(config(v2=True), SHARED, "0.33.0")
    assert padding_source(config(v2=True), ALONE, "0.33.0") is NONE
    split = config(context_parallel=2)
    with pytest.raises(LeanMoeError, match=r"0\.30\.0 .* --decode-context-parallel-size 1"):
        padding_source(split, SHARED, "0.30.0")
    assert padding_source(split, ALONE, "0.30.0") is NONE, "its slots are on other GPUs"


def test_a_mask_that_nobody_fills_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """0.25 and 0.26 on the V2 runner: every row is marked, but three have slots."""
    context = Context({"attention": torch.tensor([5, 6, 7, -1])})
    context.is_padding = torch.ones(4, dtype=torch.bool)  # type: ignore[attr-defined]
    install_context(monkeypatch, context)
    plan = Plan.uniform(Fingerprint("Model", 1, 1, 16, 4), Rule(guaranteed=2))
    routing = VllmLayerRouting(FusedTopKRouter(), plan, 0, padding=StepPadding(SLOTS))
    weights, _ = routing(torch.empty(4, 1), torch.randn(4, 16), None)
    assert weights.sum(-1).tolist() == pytest.approx([1.0, 1.0, 1.0, 0.0])


def test_rows_without_a_place_in_the_cache_are_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    context = Context({"attention": torch.tensor([5, 6, 7, -1, -1])})
    install_context(monkeypatch, context)
    padding = StepPadding()
    mask = padding.rows(5)
    assert mask is not None
    assert mask.tolist() == [False, False, False, True, True]
    assert padding.rows(5) is not None
    assert len(context.additional_kwargs) == 1  # computed once a step


def test_layers_that_keep_a_state_have_no_slots_to_go_by(monkeypatch: pytest.MonkeyPatch) -> None:
    state = type("LinearAttention", (type("MambaBase", (), {}),), {})()
    slots = {"linear": torch.tensor([0, 0, -1]), "attention": torch.tensor([5, 6, 7])}
    context = Context(slots, no_compile_layers={"linear": state, "attention": object()})
    install_context(monkeypatch, context)
    mask = StepPadding().rows(3)
    assert mask is not None
    assert not bool(mask.any())


def test_rows_behind_the_slots_of_a_step_are_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    context = Context({"attention": torch.tensor([5, 6])})
    context.batch_descriptor = SimpleNamespace(num_tokens=4)  # type: ignore[attr-defined]
    install_context(monkeypatch, context)
    mask = StepPadding().rows(4)
    assert mask is not None
    assert mask.tolist() == [False, False, True, True]


def test_what_the_runner_marks_is_read_where_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    context = Context({"attention": torch.tensor([5, 6])})
    context.is_padding = torch.tensor([False, True, True])  # type: ignore[attr-defined]
    install_context(monkeypatch, context)
    mask = StepPadding(MARKED).rows(2)
    assert mask is not None
    assert mask.tolist() == [False, True]
    assert StepPadding(NONE).rows(2) is None


def test_a_step_with_no_cache_has_no_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    install_context(monkeypatch, Context())
    assert StepPadding().rows(3) is None
    install_context(monkeypatch, None)
    assert StepPadding().rows(3) is None


def test_each_sequence_parallel_rank_has_its_share_of_padding() -> None:
    mask = torch.tensor([False, False, False, True, True])
    assert rank_share(mask, 0, 2).tolist() == [False, False, False]
    assert rank_share(mask, 1, 2).tolist() == [True, True, True]


def test_gathered_tokens_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    install_context(monkeypatch, Context({"attention": torch.tensor([5, 6])}))
    with pytest.raises(LeanMoeError, match="--data-parallel-size"):
        StepPadding().rows(4)
