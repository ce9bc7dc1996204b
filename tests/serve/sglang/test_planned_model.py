"""Which rules a call gets, and what is refused of a loaded model."""

from __future__ import annotations

import logging

import pytest
import torch

from leanmoe.core.errors import LeanMoeError
from leanmoe.models.shape import read_shape
from leanmoe.plan import Band, Plan, Rule
from leanmoe.serve.sglang import planned_model
from leanmoe.serve.sglang.planned_model import SglangPlan
from leanmoe.serve.sglang.routing import BandRule
from tests.serve.sglang.test_patch import CONFIG, MODEL, Model, TopKConfig, build

FEW, SOME = Rule(top_k=1), Rule(top_k=2)
BANDS = Plan.banded(MODEL, (Band(8, (FEW, FEW)), Band(20, (SOME, SOME))))
SHARING = Plan.uniform(MODEL, Rule(guaranteed=1))


def planned(plan: Plan = BANDS) -> SglangPlan:
    made = SglangPlan(plan, "plan.json")
    made.shape = read_shape(CONFIG)
    return made


@pytest.mark.parametrize(
    ("rows", "sizes", "wanted"),
    [
        (8, (8, 16, 32), [BandRule(8, FEW)]),
        (16, (8, 16, 32), [BandRule(20, SOME)]),
        (16, (4, 16, 32), [BandRule(8, FEW), BandRule(20, SOME)]),
        (32, (8, 16, 32), [BandRule(20, SOME), BandRule(None, Rule())]),
        (32, (32,), [BandRule(8, FEW), BandRule(20, SOME), BandRule(None, Rule())]),
        (64, (8, 16, 32, 64), [BandRule(None, Rule())]),
        (16, None, [BandRule(20, SOME)]),
    ],
)
def test_a_captured_step_has_the_rules_of_all_its_replays(
    rows: int, sizes: tuple[int, ...] | None, wanted: list[BandRule]
) -> None:
    made = planned()
    made.captured_sizes = sizes
    assert made.bands(TopKConfig(), 0, rows, True) == wanted


def test_where_real_rows_are_not_counted_padded_ones_pick_the_band() -> None:
    made = planned()
    made.captured_sizes = (4, 16)
    assert made.bands(TopKConfig(), 0, 16, False) == [BandRule(20, SOME)]


def test_a_captured_step_that_shares_experts_must_be_counted() -> None:
    made = planned(SHARING)
    assert made.bands(TopKConfig(), 0, 16, False) == [BandRule(None, Rule(guaranteed=1))]
    made.captured_sizes = (16,)
    with pytest.raises(LeanMoeError, match="how many of 16 captured rows are real"):
        made.bands(TopKConfig(), 0, 16, False)


def test_rules_that_share_experts_are_refused_where_padding_cannot_be_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(planned_model, "not_counted_reason", lambda: "gathered: unset --it")
    monkeypatch.setattr(planned_model, "check_counts", lambda: None)
    with pytest.raises(LeanMoeError, match=r"would take part in rules that share.*unset --it"):
        build(planned=SglangPlan(SHARING, "plan.json", lambda: False))
    with caplog.at_level(logging.INFO, "sglang.leanmoe"):
        build(planned=SglangPlan(BANDS, "plan.json", lambda: False))
    assert "padding not told, so that padded rows pick a band (gathered" in caplog.text


class HashTopK(torch.nn.Module):
    layer_id = 1


class BlockRouting(torch.nn.Module):
    layer_id, use_block_routing = 1, True


def test_layers_that_choose_past_topk_are_refused_by_name() -> None:
    with pytest.raises(LeanMoeError, match=r"layer 1: its experts are hashed .*HashTopK"):
        build(layers=[0], model=Model(HashTopK()))
    with pytest.raises(LeanMoeError, match=r"layer 1: .* for blocks of tokens .use_block_routing"):
        build(model=Model(BlockRouting()))
    as_trained = Plan.banded(MODEL, (Band(None, (FEW, Rule())),))
    build(layers=[0], model=Model(HashTopK()), planned=SglangPlan(as_trained, "plan.json"))


def test_the_log_says_what_stands_in_padding_and_in_a_skipped_slot(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "sglang.leanmoe"):
        build()
    assert "plan plan.json at work in 2 MoE layers" in caplog.text
    assert "best expert again, weight 0, and computed (its experts are no kernels" in caplog.text
    monkeypatch.setattr(planned_model, "fails_on_minus_one", lambda *_: None)
    made = planned(SHARING)
    with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.INFO, "sglang.leanmoe"):
        patch.setattr(planned_model, "not_minus_one_reason", lambda *_: None)
        made.topks = {0: None, 1: None}
        made.check_layers(Model(), "cpu")
    assert made.skipped_id == -1
    assert "a skipped slot is id -1, no weight read and no row computed" in caplog.text
