"""The training experts compute what the plain loop does, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from reference_model import experts
from reference_model.architecture import build, routers, to_bf16
from tests.reference_model.conftest import TINY


@pytest.mark.parametrize("implementation", ["grouped_mm", experts.NAME])
def test_training_experts_agree_with_the_plain_loop(implementation: str) -> None:
    experts.register()
    model = build(TINY.model, seed=1)
    to_bf16(model)
    for gate in routers(model):
        assert isinstance(gate.weight, nn.Parameter)
        nn.init.normal_(gate.weight, std=0.3)
    ids = torch.randint(0, 64, (2, 32), generator=torch.Generator().manual_seed(0))
    found = {}
    for name in ("eager", implementation):
        model.set_experts_implementation(name)
        model.zero_grad()
        out = model(input_ids=ids, labels=ids, use_cache=False)
        out.loss.backward()
        grads = {n: p.grad.float().clone() for n, p in model.named_parameters()}
        found[name] = (out.logits.detach().float(), grads)
    logits, grads = found["eager"]
    assert (found[implementation][0] - logits).norm() < 1e-2 * logits.norm()
    for name, grad in grads.items():
        assert (found[implementation][1][name] - grad).norm() < 3e-2 * grad.norm(), name
