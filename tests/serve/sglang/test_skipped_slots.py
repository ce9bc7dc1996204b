"""Whether experts pass over id -1 is tried; on stand-ins of SGLang's experts."""

from __future__ import annotations

import torch
from torch import Tensor

from leanmoe.serve.sglang.skipped_slots import fails_on_minus_one, looped_experts

EXPERTS, SLOTS = 70, (2, 6)


def passing_over(
    hidden_TD: Tensor, gate_up_EMD: Tensor, down_EDM: Tensor, ids_TK: Tensor, weights_TK: Tensor
) -> Tensor:
    looped = looped_experts(hidden_TD, gate_up_EMD, down_EDM, ids_TK, weights_TK)
    return looped.to(torch.bfloat16)


def reading_the_last(
    hidden_TD: Tensor, gate_up_EMD: Tensor, down_EDM: Tensor, ids_TK: Tensor, weights_TK: Tensor
) -> Tensor:
    """Takes -1 for the last expert, as a table that is indexed by it does."""
    last = gate_up_EMD.shape[0] - 1
    return passing_over(
        hidden_TD, gate_up_EMD, down_EDM, ids_TK.masked_fill(ids_TK < 0, last), weights_TK
    )


def multiplying_by_zero(
    hidden_TD: Tensor, gate_up_EMD: Tensor, down_EDM: Tensor, ids_TK: Tensor, weights_TK: Tensor
) -> Tensor:
    """Reads the last expert for -1, and gives it weight 0: not a number times zero is none."""
    last = gate_up_EMD.shape[0] - 1
    return passing_over(
        hidden_TD, gate_up_EMD, down_EDM, ids_TK.masked_fill(ids_TK < 0, last),
        weights_TK.masked_fill(ids_TK < 0, 0),
    )  # fmt: skip


def giving_up(*_step: Tensor) -> Tensor:
    raise IndexError("id -1")


def test_experts_that_pass_over_minus_one_do() -> None:
    assert fails_on_minus_one(passing_over, EXPERTS, SLOTS, "cpu") is None


def test_others_are_found_out() -> None:
    for experts in (reading_the_last, multiplying_by_zero):
        reason = fails_on_minus_one(experts, EXPERTS, SLOTS, "cpu")
        assert reason is not None
        assert "do not pass over id -1 in 1 rows" in reason
    assert "IndexError" in str(fails_on_minus_one(giving_up, EXPERTS, SLOTS, "cpu"))
