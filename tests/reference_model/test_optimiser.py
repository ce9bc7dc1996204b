"""The optimiser's schedule and its float32 masters."""

from __future__ import annotations

import pytest
import torch

from reference_model.optimiser import MasterAdamW, OptimiserSettings, rate_at


def test_the_rate_rises_stays_and_falls() -> None:
    settings = OptimiserSettings(
        learning_rate=1.0, warmup_tokens=100, decay_share=0.5, final_share=0.1
    )
    rates = [rate_at(tokens, 1000, settings) for tokens in (0, 49, 100, 500, 750, 1000)]
    assert rates == pytest.approx([0.01, 0.5, 1.0, 1.0, 0.55, 0.1])


def test_small_steps_add_up_in_the_masters_of_bf16_weights() -> None:
    weight = torch.ones(4, 4, dtype=torch.bfloat16, requires_grad=True)
    adam = MasterAdamW({"w": weight}, OptimiserSettings(weight_decay=0.0))
    for _ in range(8):
        weight.grad = torch.ones_like(weight)
        norm = adam.step(rate=1e-3)  # bf16 alone would round each of these away
    assert float(norm) == pytest.approx(4.0)
    assert float(adam.masters[0].detach().mean()) == pytest.approx(1 - 8e-3, rel=1e-4)
    assert float(weight.detach().float().mean()) == pytest.approx(1 - 8e-3, abs=4e-3)
    other = MasterAdamW({"w": torch.zeros(4, 4, dtype=torch.bfloat16)}, adam.settings)
    other.load(adam.state())
    assert torch.equal(other.masters[0], adam.masters[0])
    assert torch.equal(other.weights[0], weight.detach())
