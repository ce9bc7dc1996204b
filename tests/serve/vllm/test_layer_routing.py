"""The plugin's routing against the reference, with stand-ins for vLLM's objects."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from leanmoe.core.errors import LeanMoeError
from leanmoe.kernels.dispatch import repeat_best, route_ids
from leanmoe.models.routers import Router
from leanmoe.plan import Band, Fingerprint, Plan, Rule
from leanmoe.routing import route
from leanmoe.serve.routing_statistics import RoutingStatistics
from leanmoe.serve.vllm.checks import read_router
from leanmoe.serve.vllm.layer_routing import (
    OneCopy,
    VllmLayerRouting,
    add_slots,
    one_copy,
    reads_one_copy,
    step_rows,
)
from leanmoe.serve.vllm.padding import PaddingSource, StepPadding
from leanmoe.serve.vllm.rule_rows import RuleRows, StepRequests
from leanmoe.serve.vllm.small_steps import Skipped, Skipping
from tests.serve.stand_ins import (
    BaseRouter,
    Context,
    FusedTopKRouter,
    GroupedTopKRouter,
    gemma4_router,
    install_context,
    ranks,
)

MODEL = Fingerprint("Model", 3, 2, 16, 4)
SHARED = Rule(guaranteed=2, threshold=0.3, renormalise=0.0)
BANDED = Plan.banded(
    MODEL,
    (
        Band(4, (Rule(), Rule(top_k=2))),
        Band(8, (SHARED, Rule(budget=5))),
        Band(16, (Rule(top_k=3, guaranteed=1), Rule(top_p=0.6))),
    ),
)


@pytest.fixture(autouse=True)
def _no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    install_context(monkeypatch, None)


def logits(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, 16, generator=torch.Generator().manual_seed(seed))


def routed(router: BaseRouter, plan: Plan, layer: int, rows: int, **more: object) -> list[Tensor]:
    routing = VllmLayerRouting(router, plan, layer, **more)  # type: ignore[arg-type]
    return list(routing(torch.empty(rows, 1), logits(rows), None))


def test_gemma_4s_weights_have_their_experts_factor() -> None:
    rule, router = Rule(top_k=3, guaranteed=1), gemma4_router()
    weights, ids = routed(router, Plan.uniform(MODEL, rule), 0, 6)
    wanted = route(logits(6), Router(normalise=True), 4, rule)
    scale_E = torch.linspace(0.5, 2.0, 16)
    plain_TE = torch.zeros(6, 17).scatter_add(1, wanted.ids_BTK, wanted.weights_BTK)[:, :16]
    found_TE = torch.zeros(6, 16).scatter_add(1, ids.long(), weights)
    torch.testing.assert_close(found_TE, plain_TE * scale_E)


@pytest.mark.parametrize("rows", [1, 4, 5, 8, 9, 16, 17])
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("kind", [FusedTopKRouter, GroupedTopKRouter])
def test_each_band_routes_as_the_reference(kind: type[BaseRouter], layer: int, rows: int) -> None:
    rule = BANDED.rules_for(rows)[layer]
    router = kind()
    weights, ids = routed(router, BANDED, layer, rows)
    if rule.is_empty:
        stock = router._compute_routing(torch.empty(rows, 1), logits(rows), None)
        assert torch.equal(weights, stock[0])
        assert torch.equal(ids, stock[1])
        return
    if rule.top_k is not None and rule == Rule(top_k=rule.top_k):
        router.top_k = rule.top_k
        assert torch.equal(weights, router._compute_routing(weights, logits(rows), None)[0])
        return
    bias = getattr(router, "e_score_correction_bias", None)
    wanted = route(logits(rows), read_router(router), 4, rule, bias)
    assert ids.dtype is torch.int32
    assert ids.tolist() == repeat_best(wanted.ids_BTK, 16).tolist()
    torch.testing.assert_close(weights, wanted.weights_BTK, atol=1e-6, rtol=1e-5)


def test_every_step_has_the_models_width_where_ranks_exchange_ids() -> None:
    for rows in (4, 8, 16, 17):
        weights, ids = routed(FusedTopKRouter(), BANDED, 1, rows, is_full_width=True)
        assert ids.shape == weights.shape == (rows, 4)


def test_padding_has_no_part_in_a_steps_routing(monkeypatch: pytest.MonkeyPatch) -> None:
    install_context(monkeypatch, Context({"attention": torch.tensor([5, 6, 7, -1, -1])}))
    weights, ids = routed(FusedTopKRouter(), Plan.uniform(MODEL, Rule(guaranteed=1)), 0, 5)
    alone, _, _ = route(logits(5)[:3], Router(normalise=True), 4, Rule(guaranteed=1))
    assert ids[:3].tolist() == repeat_best(alone, 16).tolist()
    assert not bool(weights[3:].any())
    assert set(ids[3:].flatten().tolist()) == {int(ids[0, 0])}


def test_the_rows_of_all_ranks_decide_the_band(monkeypatch: pytest.MonkeyPatch) -> None:
    install_context(monkeypatch, Context(dp_metadata=ranks(4, 4)))
    assert step_rows(4) == 8
    install_context(monkeypatch, Context())
    assert step_rows(4) == 4


def test_added_slots_weigh_nothing() -> None:
    ids, weights = add_slots(torch.tensor([[4, 2]]), torch.tensor([[0.7, 0.3]]), 4)
    assert ids.tolist() == [[4, 2, 4, 4]]
    assert weights.tolist() == [[torch.tensor(0.7).item(), torch.tensor(0.3).item(), 0.0, 0.0]]
    same, _ = add_slots(ids, weights, 3)
    assert same is ids


def test_the_layers_statistics_say_what_its_steps_ran() -> None:
    statistics = RoutingStatistics(2, 16)
    routed(FusedTopKRouter(), BANDED, 0, 6, statistics=statistics)
    routed(FusedTopKRouter(), BANDED, 1, 6, statistics=statistics)
    report = statistics.read().to_json()
    assert (report["rows"], report["is_captured"]) == (6, False)
    assert report["layers"][1]["tokens"] == 6
    assert report["layers"][1]["distinct"] <= 6  # the budget of 5, or every token's best
    wanted = route(logits(6), Router(normalise=True), 4, SHARED)
    used = wanted.ids_BTK[wanted.ids_BTK < 16]
    assert report["layers"][0]["distinct"] == len(set(used.tolist()))
    assert report["layers"][0]["activated"] == pytest.approx(len(used) / 6)


def test_ids_of_no_expert_never_go_to_experts_they_were_not_settled_for() -> None:
    plan = Plan.uniform(MODEL, Rule(threshold=0.9))
    routing = VllmLayerRouting(FusedTopKRouter(), plan, 0)
    routing.skipping = Skipping.at_all_sizes(Skipped.MINUS_ONE)
    _weights, ids = routing(torch.empty(6, 1), logits(6), None)
    assert int(ids.min()) == -1
    assert routing.skips_step(6)
    routing.experts_in_place = lambda: False
    with pytest.raises(LeanMoeError, match=r"loaded its weights anew.*start the engine again"):
        routing(torch.empty(6, 1), logits(6), None)


def test_a_step_that_vllm_routes_skips_nothing() -> None:
    routing = VllmLayerRouting(FusedTopKRouter(), BANDED, 1)
    routing.skipping = Skipping.at_all_sizes(Skipped.MINUS_ONE)
    assert [routing.skips_step(rows) for rows in (4, 8, 16, 17)] == [False, True, True, False]


def test_every_launch_is_made_before_vllm_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that steps of any size launch: by rule, with padding or without, by the skipped id."""
    seen: list[tuple[Any, ...]] = []

    def noting(logits: Tensor, *arguments: Any, **others: Any) -> Any:
        _router, _top_k, rule, _bias, padding, _scope = arguments
        seen.append((rule, logits.dtype, padding is not None, others["skipped_id"]))
        return route_ids(logits, *arguments, **others)

    monkeypatch.setattr("leanmoe.serve.vllm.layer_routing.route_ids", noting)
    plan = Plan.banded(MODEL, (Band(4, (SHARED,) * 2), Band(None, (Rule(threshold=0.5),) * 2)))
    routing = VllmLayerRouting(FusedTopKRouter(), plan, 0, padding=StepPadding(PaddingSource.NONE))
    routing.skipping = Skipping(small=Skipped.MINUS_ONE)
    routing.warm_up()
    assert not seen, "the dtype of its logits is not known before a step"
    routing(torch.empty(9, 1), logits(9).bfloat16(), None)
    seen.clear()
    routing.warm_up()
    assert set(seen) == {
        (rule, torch.bfloat16, padded, skipped)
        for rule in (SHARED, Rule(threshold=0.5))
        for padded in (False, True)
        for skipped in (None, -1)
    }


EXPERTS, SLOTS, COPIES, GPUS = 16, 4, 3, 4


class CopiesRouter:
    """What vLLM's `BaseRouter` does with copies: by a hash of the row, then recorded."""

    def __init__(self, physical: Tensor | None, copies: Tensor | None, held: int) -> None:
        self.global_num_experts = EXPERTS
        self.eplb_state: Any = SimpleNamespace(
            logical_to_physical_map=physical,
            logical_replica_count=copies,
            expert_load_view=torch.zeros(held, dtype=torch.int64),
        )

    def _apply_eplb_mapping(self, topk_ids: Tensor) -> Tensor:
        state = self.eplb_state
        if state.logical_to_physical_map is None:
            return topk_ids
        is_known = topk_ids >= 0
        logical = topk_ids.clamp(min=0).long()
        rows = torch.arange(topk_ids.shape[0]).unsqueeze(1)
        copy = (rows * 2654435769 & 0xFFFFFFFF) % state.logical_replica_count[logical]
        physical = torch.where(is_known, state.logical_to_physical_map[logical, copy], -1)
        reads = torch.bincount(physical[is_known], minlength=len(state.expert_load_view))
        state.expert_load_view += reads
        return physical.to(topk_ids.dtype)


def balanced(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Physical ids (E,C) with -1 for no copy, the number of copies, and whose each slot is."""
    generator = torch.Generator().manual_seed(seed)
    extra = torch.randint(EXPERTS, (EXPERTS // 2,), generator=generator)
    copies = (1 + torch.bincount(extra, minlength=EXPERTS)).clamp(max=COPIES)
    owners = torch.repeat_interleave(torch.arange(EXPERTS), copies)
    owners = owners[torch.randperm(len(owners), generator=generator)]
    physical = torch.full((EXPERTS, COPIES), -1)
    for expert in range(EXPERTS):
        held = (owners == expert).nonzero().flatten()
        physical[expert, : len(held)] = held
    return physical, copies, owners


def chosen_ids(rows: int, seed: int = 1) -> Tensor:
    """Ids (T,K), skipped slots among them."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(rows, EXPERTS, generator=generator).argsort(dim=1)[:, :SLOTS].int()
    ids[::3, -1] = -1
    return ids


@pytest.mark.parametrize("rows", [1, 5, 64, 128, 129, 500])
def test_outputs_are_those_of_vllms_choice(rows: int) -> None:
    physical, copies, owners = balanced()
    router, ids = CopiesRouter(physical, copies, len(owners)), chosen_ids(rows)
    stock = router._apply_eplb_mapping(ids)
    OneCopy.put(router)
    chosen = router._apply_eplb_mapping(ids)
    weights_P = torch.randn(EXPERTS, generator=torch.Generator().manual_seed(2))[owners]

    def output(mapped: Tensor) -> Tensor:
        return torch.where(mapped < 0, 0.0, weights_P[mapped.clamp(min=0).long()])

    assert torch.equal(output(chosen), output(stock))
    assert torch.equal(chosen < 0, ids < 0)
    assert chosen.dtype == ids.dtype


def test_a_step_reads_one_copy_and_a_large_one_all_of_them() -> None:
    physical, copies, owners = balanced()
    router = CopiesRouter(physical, copies, len(owners))
    stock = router._apply_eplb_mapping(chosen_ids(64)).unique()
    OneCopy.put(router)
    chosen = router._apply_eplb_mapping(chosen_ids(64)).unique()
    assert (chosen >= 0).sum() == EXPERTS < (stock >= 0).sum() == len(owners)
    assert (router._apply_eplb_mapping(chosen_ids(129)).unique() >= 0).sum() == len(owners)


def test_the_load_is_recorded_of_the_experts_that_were_asked_for() -> None:
    physical, copies, owners = balanced()
    router, ids = CopiesRouter(physical, copies, len(owners)), chosen_ids(40)
    OneCopy.put(router)
    router._apply_eplb_mapping(ids)
    load_E = torch.zeros(EXPERTS, dtype=torch.int64)
    load_E.index_add_(0, owners, router.eplb_state.expert_load_view)
    assert torch.equal(load_E, torch.bincount(ids[ids >= 0], minlength=EXPERTS))


def test_a_table_that_vllm_changes_in_place_is_followed() -> None:
    physical, copies, owners = balanced()
    router, ids = CopiesRouter(physical, copies, len(owners)), chosen_ids(8)
    OneCopy.put(router)
    router._apply_eplb_mapping(ids)
    moved, moved_copies, owners = balanced(seed=7)
    physical.copy_(moved)
    copies.copy_(moved_copies)
    mapped = router._apply_eplb_mapping(ids)
    assert torch.equal(owners[mapped[ids >= 0].long()], ids[ids >= 0].long())


def test_rows_of_all_ranks_count(monkeypatch: pytest.MonkeyPatch) -> None:
    physical, copies, owners = balanced()
    router = CopiesRouter(physical, copies, len(owners))
    OneCopy.put(router)
    install_context(monkeypatch, SimpleNamespace(dp_metadata=ranks(64, 400)))
    assert (router._apply_eplb_mapping(chosen_ids(64)).unique() >= 0).sum() == len(owners)


def test_without_a_balancer_or_its_tables_nothing_changes() -> None:
    router = CopiesRouter(None, None, 1)
    OneCopy.put(router)
    assert torch.equal(router._apply_eplb_mapping(chosen_ids(5)), chosen_ids(5))
    alone = CopiesRouter(None, None, 1)
    alone.eplb_state = None
    OneCopy.put(alone)
    assert "_apply_eplb_mapping" not in vars(alone)


def test_an_expert_that_was_lost_stays_without_a_copy() -> None:
    table = one_copy(torch.tensor([[5, 2], [-1, -1]]), torch.tensor([2, 0]))
    assert table.tolist() == [[2, 2], [-1, -1]]


def test_the_bound_is_a_tile_of_rows_for_a_popular_expert() -> None:
    assert reads_one_copy(1024, 8, 256)
    assert not reads_one_copy(1025, 8, 256)


PROMPTED = Plan.banded(
    MODEL,
    (Band(2, (Rule(top_k=3), Rule())), Band(4, (Rule(guaranteed=2), Rule()))),
    prompt=(Rule(top_k=0), Rule()),
)
ROLES = (0, 0, 1, 0, 1, 1)
"""1 for the reply rows of a step of six, two requests; what is behind them is padding."""


def prompted(plan: Plan, has_ranks: bool = False) -> RuleRows:
    """Rule rows of a step of those roles: three rows of one request, two of another, one more."""
    rows = RuleRows(plan, 8, has_ranks=has_ranks)
    news = [
        SimpleNamespace(req_id=name, sampling_params=SimpleNamespace(prompt_logprobs=None))
        for name in "abc"
    ]
    rows.hear(SimpleNamespace(finished_req_ids=(), scheduled_new_reqs=news))
    columns = [np.array(column, dtype=np.int32) for column in ((3, 2, 1), (4, 0, 9), (7, 2, 4))]
    rows.fill(StepRequests("abc", *columns), torch.device("cpu"))
    assert rows.rows(6).tolist() == [2 - role for role in ROLES]
    return rows


@pytest.mark.parametrize("kind", [FusedTopKRouter, GroupedTopKRouter])
def test_prompt_rows_are_under_rules_of_their_own(
    monkeypatch: pytest.MonkeyPatch, kind: type[BaseRouter]
) -> None:
    """Each part of a step is as that part alone, with the band of its reply rows."""
    install_context(monkeypatch, Context({"attention": torch.tensor([5, 6, 7, 8, 9, 10, -1, -1])}))
    router = kind()
    routing = VllmLayerRouting(router, PROMPTED, 0, rule_rows=prompted(PROMPTED))
    routing.skipping = Skipping.at_all_sizes(Skipped.MINUS_ONE)
    assert (routing.by_table, routing.is_plain, routing.slots) == (True, False, {4})
    weights, ids = routing(torch.empty(8, 1), logits(8), None)
    assert ids.shape == weights.shape == (8, 4)
    is_reply_T = torch.tensor(ROLES).bool()
    assert bool((ids[:6][~is_reply_T] == -1).all())
    assert bool((ids[6:] == -1).all()), "padding"
    bias = getattr(router, "e_score_correction_bias", None)
    alone = route(logits(8)[:6][is_reply_T], read_router(router), 4, Rule(guaranteed=2), bias)
    assert ids[:6][is_reply_T].tolist() == alone.ids_BTK.where(alone.ids_BTK < 16, -1).tolist()
    torch.testing.assert_close(weights[:6][is_reply_T], alone.weights_BTK, atol=1e-6, rtol=1e-5)
    assert routing.skips_step(8)
    assert routing.groups_step(8) is False
    routing.warm_up()


def test_a_layer_of_empty_rules_alone_stays_vllms_beside_prompt_rules() -> None:
    routing = VllmLayerRouting(FusedTopKRouter(), PROMPTED, 1, rule_rows=prompted(PROMPTED))
    assert not routing.by_table
    weights, _ = routing(torch.empty(6, 1), logits(6), None)
    stock, _ = FusedTopKRouter()._compute_routing(torch.empty(6, 1), logits(6), None)
    assert torch.equal(weights, stock)


def test_the_rows_of_all_ranks_pick_the_band_of_prompt_rules_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rules = (Rule(top_k=1), Rule(top_k=2))
    plan = Plan.banded(MODEL, (Band(8, rules), Band(16, rules[::-1])), prompt=rules)
    routing = VllmLayerRouting(FusedTopKRouter(), plan, 0, rule_rows=prompted(plan, has_ranks=True))
    for others, used in ((2, 1), (6, 2), (16, 4)):
        install_context(monkeypatch, Context(dp_metadata=ranks(6, others)))
        weights, _ = routing(torch.empty(6, 1), logits(6), None)
        replies = weights[torch.tensor(ROLES).bool()]
        assert (replies != 0).sum(-1).tolist() == [used] * 3
        assert int((weights[0] != 0).sum()) == 1
