"""What a description of expert weights refuses."""

from __future__ import annotations

import pytest
import torch

from leanmoe.core.errors import LeanMoeError
from leanmoe.kernels import ExpertWeights, Gate


def test_shapes_that_do_not_fit_each_other() -> None:
    gate_up, down = torch.zeros(4, 12, 10), torch.zeros(4, 10, 6)
    weights = ExpertWeights(gate_up, down)
    assert (weights.experts, weights.hidden, weights.width) == (4, 10, 6)
    with pytest.raises(LeanMoeError, match="gate_up has shape"):
        ExpertWeights(gate_up, down.transpose(1, 2), is_transposed=False)
    with pytest.raises(LeanMoeError, match="down has shape"):
        ExpertWeights(gate_up, down[:3])
    with pytest.raises(LeanMoeError, match="gate_up_bias has shape"):
        ExpertWeights(gate_up, down, gate_up_bias=torch.zeros(4, 6))
    with pytest.raises(LeanMoeError, match="must have 3 axes"):
        ExpertWeights(gate_up[0], down)


def test_gates_that_do_not_exist() -> None:
    with pytest.raises(LeanMoeError, match="gate activation is 'mish'"):
        Gate("mish")  # type: ignore[arg-type]
    with pytest.raises(LeanMoeError, match="limit is 0"):
        Gate(limit=0)
    with pytest.raises(LeanMoeError, match="only silu has an alpha"):
        Gate("relu", alpha=2.0)
