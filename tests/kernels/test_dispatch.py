"""Which implementation runs is said by name, with a reason."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch

from leanmoe.kernels import ExpertWeights, choose_experts, experts_cpu, experts_reference
from leanmoe.kernels import dispatch as choose_module
from tests.kernels.layers import in_float64, random_layer


def test_kernel_where_it_can() -> None:
    choice = choose_experts(random_layer(dtype=torch.bfloat16), "cpu")
    assert choice.name == "cpu"
    assert choice.function is experts_cpu
    assert "bfloat16" in choice.reason


def test_reference_elsewhere_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    weights = random_layer()
    own = ExpertWeights(weights.gate_up, weights.down, gate=lambda both: both)
    for layer, device, reason in (
        (in_float64(weights), "cpu", "float64"),
        (own, "cpu", "function of the model's own"),
        (weights, "cuda", "the weights are on cpu"),
        (weights, "mps", "no kernel for mps"),
    ):
        choice = choose_experts(layer, device)
        assert (choice.name, choice.function) == ("reference", experts_reference)
        assert reason in choice.reason


def test_reference_when_packed_weights_do_not_fit_in_memory() -> None:
    with patch.object(choose_module, "SHARE_OF_FREE_MEMORY", 0.0):
        choice = choose_experts(random_layer(), "cpu")
    assert choice.name == "reference"
    assert "are free" in choice.reason
