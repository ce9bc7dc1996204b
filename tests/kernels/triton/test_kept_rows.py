"""Activation of the rows that have an expert, beside plain torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from leanmoe.kernels.triton.kept_rows import silu_of_kept
from tests.kernels.triton.routed import DEVICE


@pytest.mark.parametrize("local_of_E", [None, torch.tensor([-1, 0, 1, -1])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_rows_are_activated_and_the_others_neither_read_nor_written(
    dtype: torch.dtype, local_of_E: Tensor | None
) -> None:
    generator = torch.Generator().manual_seed(0)
    ids_TK = torch.tensor([[2, -1, 1], [-1, -1, -1], [0, 3, 2]], dtype=torch.int32)
    gate_up_XM = torch.randn(9, 24, generator=generator).mul(4).to(dtype)
    local_TK = ids_TK if local_of_E is None else local_of_E[ids_TK.clamp_min(0).long()]
    is_kept_X = ((ids_TK >= 0) & (local_TK >= 0)).view(-1)
    gate_up_XM[~is_kept_X] = float("nan")
    act_XM = torch.full((9, 12), -7.0, dtype=dtype, device=DEVICE)
    where = None if local_of_E is None else local_of_E.to(DEVICE)
    silu_of_kept(gate_up_XM.to(DEVICE), act_XM, ids_TK.to(DEVICE), where)
    gate, up = gate_up_XM.chunk(2, dim=1)
    torch.testing.assert_close(
        act_XM.cpu()[is_kept_X], functional.silu(gate.float()).to(dtype)[is_kept_X] * up[is_kept_X]
    )
    assert bool((act_XM[~is_kept_X.to(DEVICE)] == -7.0).all())
