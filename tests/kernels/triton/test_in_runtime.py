"""How the runtime uses the GPU kernels, in the interpreter."""

from __future__ import annotations

import pytest
import torch

from leanmoe.kernels import ExpertWeights, choose_experts, choose_router, experts_gpu
from leanmoe.models.routers import Router
from leanmoe.plan import Rule
from leanmoe.routing import ALONE, route
from tests.kernels.layers import random_layer
from tests.kernels.triton.test_experts import DEVICE, on_device


@pytest.mark.parametrize("rule", [Rule(top_k=2), Rule(guaranteed=1), Rule(budget=3)], ids=str)
@pytest.mark.parametrize("steps", [None, 1, 2])
def test_one_step_runs_on_the_gpu_and_many_by_the_reference(rule: Rule, steps: int | None) -> None:
    leading = () if steps is None else (steps,)
    logits = torch.randn(*leading, 5, 16, generator=torch.Generator().manual_seed(1))
    padding = torch.zeros(*leading, 5, dtype=torch.bool)
    padding[..., 2] = True
    choice = choose_router(logits.to(DEVICE), Router(), rule, device="cuda")
    assert choice.name == ("reference" if steps == 2 else "gpu")
    found = choice.function(logits.to(DEVICE), Router(), 4, rule, None, padding.to(DEVICE), ALONE)
    wanted = route(logits, Router(), 4, rule, None, padding)
    assert found.ids_BTK.shape == wanted.ids_BTK.shape
    assert found.ids_BTK.sort(dim=-1)[0].tolist() == wanted.ids_BTK.sort(dim=-1)[0].tolist()
    assert (found.over_budget_B is None) == (wanted.over_budget_B is None)
    if found.over_budget_B is not None and wanted.over_budget_B is not None:
        assert found.over_budget_B.tolist() == wanted.over_budget_B.tolist()


def test_the_kernel_is_chosen_and_says_how_it_is_tuned() -> None:
    weights = on_device(random_layer())
    choice = choose_experts(weights, "cuda")
    assert (choice.name, choice.function) == ("gpu", experts_gpu)
    assert "a guess" in choice.reason
    odd = ExpertWeights(weights.gate_up.double(), weights.down.double())
    assert choose_experts(odd, "cuda").name == "reference"
