"""Several ranks, on CPUs with gloo: what must agree agrees, and no rank waits for ever.

Each scenario runs in every process of a group of 2 and of 4, which are started once. A process
that is waited for in vain fails the group's timeout.
"""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from leanmoe.kernels.dispatch import fast_route
from leanmoe.plan import Rule
from leanmoe.plan.placement import Placement
from leanmoe.routing import BatchScope, Routing, count_distinct_by_rank, route
from tests.conformance.cases import ROUTERS

WORLDS = (2, 4)
TIMEOUT = timedelta(seconds=40)
EXPERTS, TOP_K, WIDTH = 32, 4, 6
RULES = (
    Rule(guaranteed=1),
    Rule(budget=9),
    Rule(guaranteed=2, budget=7, renormalise=0.0),
    Rule(threshold=0.3, budget=12, budget_per_rank=4),
    Rule(budget_per_rank=3, experts=tuple(range(0, 30))),
)
UNEVEN: tuple[tuple[int, ...], ...] = (
    (5, 0, 9, 1),
    (0, 7, 0, 0),
    (1, 1, 1, 1),
    (0, 0, 0, 0),
    (3, 20, 2, 0),
)
"""Tokens of each rank in a step; of a group of 2 the first two count."""


def draw(tokens: int, seed: int) -> Tensor:
    return torch.randn(tokens, EXPERTS, generator=torch.Generator().manual_seed(seed))


def bias_of(name: str) -> Tensor | None:
    return draw(1, 99)[0] * 0.1 if ROUTERS[name].ranking_bias else None


def scope_of_all_ranks(
    group: dist.ProcessGroup | None = None, placement: Placement | None = None
) -> BatchScope:
    """The batch scope of all ranks of `group`: they add up what their tokens ask for."""

    def exchange(demand_B3E: Tensor) -> Tensor:
        total_B3E = demand_B3E.clone()
        dist.all_reduce(total_B3E, group=group)
        return total_B3E

    return BatchScope(placement, exchange)


def gathered(value: Tensor) -> list[Tensor]:
    """A tensor of the same shape on all ranks, from each of them."""
    values = [torch.empty_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(values, value.contiguous())
    return values


def assert_equal(routing: Routing, expected: Routing, rows: slice = slice(None)) -> None:
    """To the last bit, of the expected tokens those of `rows`."""
    assert torch.equal(routing.ids_BTK, expected.ids_BTK[rows])
    assert torch.equal(routing.weights_BTK, expected.weights_BTK[rows])
    assert (routing.over_budget_B is None) == (expected.over_budget_B is None)
    if routing.over_budget_B is not None and expected.over_budget_B is not None:
        assert bool(routing.over_budget_B) == bool(expected.over_budget_B)


def tensor_parallel(rank: int, ranks: int) -> None:
    """All ranks route all tokens alike, each with as many threads as it likes."""
    torch.set_num_threads(1 + rank % 2)
    scope = BatchScope(Placement.linear(EXPERTS, ranks))
    for name, router in ROUTERS.items():
        for seed, rule in enumerate((*RULES, Rule(), Rule(top_k=2), Rule(top_p=0.6))):
            for function in (route, fast_route):
                routing = function(draw(40, seed), router, TOP_K, rule, bias_of(name), None, scope)
                for value in routing[:2]:
                    assert all(torch.equal(value, other) for other in gathered(value))
    torch.set_num_threads(1)


def all_ranks_tokens(rank: int, ranks: int) -> None:
    """Over the scope of all, each rank's tokens get what one process with all would give them."""
    scope = scope_of_all_ranks(placement=Placement.round_robin(EXPERTS, ranks))
    for name, router in ROUTERS.items():
        for rule in RULES:
            for seed, counts in enumerate(UNEVEN):
                counts = counts[:ranks]
                all_TE = draw(sum(counts), seed)
                padding_T = torch.rand(len(all_TE), generator=torch.Generator().manual_seed(seed))
                padding_T = padding_T < 0.3
                before = sum(counts[:rank])
                mine = slice(before, before + counts[rank])
                routing = route(
                    all_TE[mine], router, TOP_K, rule, bias_of(name), padding_T[mine], scope
                )
                alone = BatchScope(scope.placement)
                expected = route(all_TE, router, TOP_K, rule, bias_of(name), padding_T, alone)
                assert_equal(routing, expected, mine)


def a_rank_of_padding(rank: int, ranks: int) -> None:
    """A rank that runs along with padding alone changes nothing for the others."""
    all_TE, rule = draw(6 * ranks, 5), Rule(guaranteed=1, budget=6)
    padding_T = torch.arange(6 * ranks) < 6  # all of rank 0's
    mine = slice(6 * rank, 6 * rank + 6)
    router = ROUTERS["softmax, normalised"]
    routing = route(all_TE[mine], router, TOP_K, rule, None, padding_T[mine], scope_of_all_ranks())
    expected = route(all_TE[6:], router, TOP_K, rule)
    if rank == 0:
        assert (routing.ids_BTK == EXPERTS).all()
    else:
        assert_equal(routing, expected, slice(6 * rank - 6, 6 * rank))


def own_ranks_tokens(rank: int, ranks: int) -> None:
    """By default the scope is a rank's own tokens: another choice than with those of all."""
    router, rule = ROUTERS["softmax"], Rule(guaranteed=1)
    own = route(draw(8, rank), router, TOP_K, rule)
    shared = route(draw(8, rank), router, TOP_K, rule, scope=scope_of_all_ranks())
    assert not torch.equal(own.ids_BTK, shared.ids_BTK)
    assert ranks > 1


def many_steps(rank: int, ranks: int) -> None:
    """Steps of any size in a row, most of them without tokens on some rank."""
    scope = scope_of_all_ranks()
    sizes = torch.Generator().manual_seed(7)
    for step in range(60):
        counts = torch.randint(0, 4, (ranks,), generator=sizes).tolist()
        all_TE = draw(sum(counts), step)
        mine = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
        arguments = (ROUTERS["V3 groups"], TOP_K, Rule(budget=5), bias_of("V3 groups"))
        routing = route(all_TE[mine], *arguments, scope=scope)
        assert_equal(routing, route(all_TE, *arguments), mine)


def expert_parallel(rank: int, ranks: int) -> None:
    """Each rank activates what the counts say; the ranks' parts add up to one process's output."""
    router, rule = ROUTERS["softmax, normalised"], Rule(budget_per_rank=4)
    hidden_TD = draw(24, 1)[:, :WIDTH].double()
    weights_EDD = draw(EXPERTS * WIDTH, 2)[:, :WIDTH].reshape(EXPERTS, WIDTH, WIDTH).double()
    for placement in (Placement.linear(EXPERTS, ranks), Placement.round_robin(EXPERTS, ranks)):
        routing = route(draw(24, 3), router, TOP_K, rule, scope=BatchScope(placement))
        mine = placement.experts_on(rank)
        whole_TD = computed(hidden_TD, routing, weights_EDD, range(EXPERTS))
        part_TD = computed(hidden_TD, routing, weights_EDD, mine)
        dist.all_reduce(part_TD)
        torch.testing.assert_close(part_TD, whole_TD)

        here = len({e for e in routing.ids_BTK.flatten().tolist() if e in mine})
        active = [int(count) for count in gathered(torch.tensor(here))]
        assert active == count_distinct_by_rank(routing.ids_BTK, placement).tolist()
        bests = count_distinct_by_rank(routing.ids_BTK[:, :1], placement)
        assert max(active) <= max(4, int(bests.max()))
        full = route(draw(24, 3), router, TOP_K, Rule())
        assert max(active) < int(count_distinct_by_rank(full.ids_BTK, placement).max())


def logical_ids(rank: int, ranks: int) -> None:
    """An engine's map of experts to its own slots comes after routing, and changes no output."""
    placement = Placement.linear(EXPERTS, ranks)
    router, rule = ROUTERS["sigmoid with a bias"], Rule(guaranteed=2, budget_per_rank=5)
    bias_E = bias_of("sigmoid with a bias")
    routing = route(draw(16, 4), router, TOP_K, rule, bias_E, None, BatchScope(placement))
    hidden_TD = draw(16, 5)[:, :WIDTH].double()
    weights_EDD = draw(EXPERTS * WIDTH, 6)[:, :WIDTH].reshape(EXPERTS, WIDTH, WIDTH).double()
    each = EXPERTS // ranks
    shuffled = torch.arange(EXPERTS).view(ranks, each)[:, torch.randperm(each)]
    dist.broadcast(shuffled, 0)
    logical_E = shuffled.flatten()  # of the slots, those of a rank in another order
    slot_E = torch.cat((logical_E.argsort(), torch.tensor([EXPERTS])))
    in_slots = routing._replace(ids_BTK=slot_E[routing.ids_BTK])
    mine = range(rank * each, rank * each + each)
    part_TD = computed(hidden_TD, in_slots, weights_EDD[logical_E], mine)
    dist.all_reduce(part_TD)
    torch.testing.assert_close(part_TD, computed(hidden_TD, routing, weights_EDD, range(EXPERTS)))
    assert torch.equal(
        count_distinct_by_rank(in_slots.ids_BTK, placement),
        count_distinct_by_rank(routing.ids_BTK, placement),
    )


def computed(hidden_TD: Tensor, routing: Routing, weights_EDD: Tensor, held: object) -> Tensor:
    """What the experts held here add to each token."""
    out_TD = torch.zeros_like(hidden_TD)
    for token, (ids, weights) in enumerate(zip(routing.ids_BTK, routing.weights_BTK, strict=True)):
        for expert, weight in zip(ids.tolist(), weights.tolist(), strict=True):
            if expert in held:  # type: ignore[operator]
                out_TD[token] += weight * (hidden_TD[token] @ weights_EDD[expert])
    return out_TD


def a_rank_that_stays_away(rank: int, ranks: int) -> None:
    """It costs the others an error, not their time."""
    del ranks
    group = dist.new_group(timeout=timedelta(seconds=2))
    if rank == 0:
        time.sleep(4)
        return
    with pytest.raises(RuntimeError):
        route(
            draw(3, 0), ROUTERS["softmax"], 4, Rule(guaranteed=1), scope=scope_of_all_ranks(group)
        )


SCENARIOS: tuple[Callable[[int, int], None], ...] = (
    tensor_parallel,
    all_ranks_tokens,
    a_rank_of_padding,
    own_ranks_tokens,
    many_steps,
    expert_parallel,
    logical_ids,
    a_rank_that_stays_away,
)
"""In this order; the last one leaves a broken group behind."""


def run_all(rank: int, ranks: int, folder: str) -> None:
    """One process: a file for each scenario, empty where all went well."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{folder}/group", rank=rank, world_size=ranks, timeout=TIMEOUT
    )
    for scenario in SCENARIOS:
        try:
            scenario(rank, ranks)
            trouble = ""
        except BaseException:
            trouble = traceback.format_exc()
        (Path(folder) / f"{scenario.__name__}-{rank}").write_text(trouble)
        if trouble:
            break
    os._exit(0)  # the broken group's threads would abort an orderly end


@pytest.fixture(scope="module", params=WORLDS)
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    ranks: int = request.param
    folder = tmp_path_factory.mktemp(f"ranks-{ranks}")
    spawn: Any = vars(mp)["spawn"]  # torch gives it no types
    context = spawn(run_all, (ranks, str(folder)), nprocs=ranks, join=False)
    end = time.monotonic() + 3 * TIMEOUT.total_seconds()
    while not context.join(timeout=1):
        if time.monotonic() > end:
            for process in context.processes:
                process.kill()
            break
    (folder / "ranks").write_text(str(ranks))
    return folder


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_on_every_rank(scenario: Callable[[int, int], None], outcomes: Path) -> None:
    for rank in range(int((outcomes / "ranks").read_text())):
        file = outcomes / f"{scenario.__name__}-{rank}"
        trouble = file.read_text() if file.exists() else "it was not reached"
        assert not trouble, f"rank {rank}: {trouble}"
