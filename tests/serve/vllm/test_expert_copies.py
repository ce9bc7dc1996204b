"""One copy of an expert a step: equal outputs, fewer copies read; vLLM's mapping stands in."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from leanmoe.serve.vllm.expert_copies import OneCopy, one_copy, reads_one_copy
from tests.serve.stand_ins import install_context, ranks

EXPERTS, SLOTS, COPIES, GPUS = 16, 4, 3, 4


class Router:
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


def routed(rows: int, seed: int = 1) -> Tensor:
    """Ids (T,K), skipped slots among them."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(rows, EXPERTS, generator=generator).argsort(dim=1)[:, :SLOTS].int()
    ids[::3, -1] = -1
    return ids


@pytest.fixture(autouse=True)
def _no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    install_context(monkeypatch, None)


@pytest.mark.parametrize("rows", [1, 5, 64, 128, 129, 500])
def test_outputs_are_those_of_vllms_choice(rows: int) -> None:
    physical, copies, owners = balanced()
    router, ids = Router(physical, copies, len(owners)), routed(rows)
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
    router = Router(physical, copies, len(owners))
    stock = router._apply_eplb_mapping(routed(64)).unique()
    OneCopy.put(router)
    chosen = router._apply_eplb_mapping(routed(64)).unique()
    assert (chosen >= 0).sum() == EXPERTS < (stock >= 0).sum() == len(owners)
    assert (router._apply_eplb_mapping(routed(129)).unique() >= 0).sum() == len(owners)


def test_the_load_is_recorded_of_the_experts_that_were_asked_for() -> None:
    physical, copies, owners = balanced()
    router, ids = Router(physical, copies, len(owners)), routed(40)
    OneCopy.put(router)
    router._apply_eplb_mapping(ids)
    load_E = torch.zeros(EXPERTS, dtype=torch.int64)
    load_E.index_add_(0, owners, router.eplb_state.expert_load_view)
    assert torch.equal(load_E, torch.bincount(ids[ids >= 0], minlength=EXPERTS))


def test_a_table_that_vllm_changes_in_place_is_followed() -> None:
    physical, copies, owners = balanced()
    router, ids = Router(physical, copies, len(owners)), routed(8)
    OneCopy.put(router)
    router._apply_eplb_mapping(ids)
    moved, moved_copies, owners = balanced(seed=7)
    physical.copy_(moved)
    copies.copy_(moved_copies)
    mapped = router._apply_eplb_mapping(ids)
    assert torch.equal(owners[mapped[ids >= 0].long()], ids[ids >= 0].long())


def test_rows_of_all_ranks_count(monkeypatch: pytest.MonkeyPatch) -> None:
    physical, copies, owners = balanced()
    router = Router(physical, copies, len(owners))
    OneCopy.put(router)
    install_context(monkeypatch, SimpleNamespace(dp_metadata=ranks(64, 400)))
    assert (router._apply_eplb_mapping(routed(64)).unique() >= 0).sum() == len(owners)


def test_without_a_balancer_or_its_tables_nothing_changes() -> None:
    router = Router(None, None, 1)
    OneCopy.put(router)
    assert torch.equal(router._apply_eplb_mapping(routed(5)), routed(5))
    alone = Router(None, None, 1)
    alone.eplb_state = None
    OneCopy.put(alone)
    assert "_apply_eplb_mapping" not in vars(alone)


def test_an_expert_that_was_lost_stays_without_a_copy() -> None:
    table = one_copy(torch.tensor([[5, 2], [-1, -1]]), torch.tensor([2, 0]))
    assert table.tolist() == [[2, 2], [-1, -1]]


def test_the_bound_is_a_tile_of_rows_for_a_popular_expert() -> None:
    assert reads_one_copy(1024, 8, 256)
    assert not reads_one_copy(1025, 8, 256)
