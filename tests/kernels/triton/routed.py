"""Running `route_gpu` where there is a GPU or not, and comparing what it finds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from leanmoe.kernels.triton.expert_blocks import expert_blocks_reference
from leanmoe.kernels.triton.router import RoutedGpu, route_gpu, route_gpu_ids
from leanmoe.routing import Routing, route
from tests.conformance.cases import Case
from tests.conformance.test_implementations import by_expert

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def draw(tokens: int, experts: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, experts, generator=generator)
    return logits, torch.randn(experts, generator=generator) * 0.1


def there(values: Any) -> Any:
    return [v.to(DEVICE) if isinstance(v, Tensor) else v for v in values]


def route_here(*arguments: Any, **options: Any) -> RoutedGpu:
    """`route_gpu` on the GPU where there is one, what it finds back on the CPU."""
    found = route_gpu(*there(arguments), **options)
    blocks = found.blocks._replace(
        **{name: getattr(found.blocks, name).cpu() for name in ("rows", "table", "used_1")}
    )
    over = None if found.over_budget is None else found.over_budget.cpu()
    return RoutedGpu(found.ids_TK.cpu(), found.weights_TK.cpu(), over, blocks)


def repeating_here(*arguments: Any) -> tuple[Tensor, Tensor]:
    ids_TK, weights_TK = route_gpu_ids(*there(arguments))
    return ids_TK.cpu(), weights_TK.cpu()


def one_step(case: Case) -> Case:
    """The first of a case's steps."""
    padding = None if case.padding_BT is None else case.padding_BT[0]
    return replace(case, logits_BTE=case.logits_BTE[0], padding_BT=padding)


def run(case: Case, block_rows: int = 16) -> RoutedGpu:
    arguments = (case.logits_BTE, case.router, case.top_k, case.rule, case.bias_E, case.padding_BT)
    return route_here(*arguments, block_rows=block_rows)


def expected(case: Case) -> Routing:
    return route(case.logits_BTE, case.router, case.top_k, case.rule, case.bias_E, case.padding_BT)


def slots_by_expert(found: RoutedGpu, experts: int) -> list[set[int]]:
    """Which slots the blocks has for each expert; fails where one is grouped twice."""
    rows, blocks, used, block_rows = found.blocks
    slots: list[list[int]] = [[] for _ in range(experts)]
    for expert, first, count in blocks[:, : int(used)].T.tolist():
        assert 0 < count <= block_rows
        slots[expert] += rows[first : first + count].tolist()
    assert all(len(set(grouped)) == len(grouped) for grouped in slots)
    return [set(grouped) for grouped in slots]


def check_blocks(found: RoutedGpu, experts: int) -> None:
    flat = found.ids_TK.flatten().tolist()
    wanted: list[set[int]] = [set() for _ in range(experts)]
    for slot, expert in enumerate(flat):
        if expert < experts:
            wanted[expert].add(slot)
    assert slots_by_expert(found, experts) == wanted
    reference = expert_blocks_reference(found.ids_TK, experts, found.blocks.block_rows)
    assert int(found.blocks.used_1) == int(reference.used_1)


def check_same(found: RoutedGpu, wanted: Routing, experts: int) -> None:
    routing = Routing(found.ids_TK, found.weights_TK, found.over_budget)
    assert found.ids_TK.sort(dim=-1)[0].tolist() == wanted.ids_BTK.sort(dim=-1)[0].tolist()
    torch.testing.assert_close(
        by_expert(routing, experts), by_expert(wanted, experts), atol=1e-5, rtol=1e-4
    )
    assert (found.over_budget is None) == (wanted.over_budget_B is None)
    if found.over_budget is not None and wanted.over_budget_B is not None:
        assert bool(found.over_budget) == bool(wanted.over_budget_B)
