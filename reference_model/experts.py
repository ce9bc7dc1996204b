"""Routed experts for training: Transformers' grouped_mm experts, with less memory traffic.

Same matrix products (`torch.nn.functional.grouped_mm` over rows sorted by expert). Different:
rows move by gathers in the backward pass as well, where autograd would scatter-add a million
rows; and the gate weight multiplies the narrow activation before the down projection instead of
the wide float32 result after it. Registered as `leanmoe_training`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import grouped_mm, silu
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

NAME = "leanmoe_training"


def _sum_slots(rows_RH: Tensor, inverse_R: Tensor, slots: int) -> Tensor:
    """(R,H) sorted by expert to (T,H): each token's K rows, found by `inverse`, added up."""
    return rows_RH.index_select(0, inverse_R).view(-1, slots, rows_RH.shape[-1]).sum(dim=1)


def _activate(both_RI: Tensor, weights_R: Tensor) -> Tensor:
    """SwiGLU of the joint gate and up projection, times the row's gate weight."""
    gate_RI, up_RI = both_RI.chunk(2, dim=-1)
    return silu(gate_RI) * up_RI * weights_R.to(both_RI.dtype).unsqueeze(-1)


class _Steps:
    """The steps between the matrix products; `fuse` replaces them by compiled versions."""

    sum_slots: Callable[[Tensor, Tensor, int], Tensor] = staticmethod(_sum_slots)
    activate: Callable[[Tensor, Tensor], Tensor] = staticmethod(_activate)


class _Spread(torch.autograd.Function):
    """Copies each token's row to its K slots, sorted by expert; backward sums the K rows."""

    @staticmethod
    def forward(
        ctx: Any, rows_TH: Tensor, order_R: Tensor, inverse_R: Tensor, slots: int
    ) -> Tensor:
        ctx.save_for_backward(inverse_R)
        ctx.slots = slots
        return rows_TH.index_select(0, order_R // slots)

    @staticmethod
    def backward(ctx: Any, grad_RH: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse_R,) = ctx.saved_tensors
        return _Steps.sum_slots(grad_RH, inverse_R, ctx.slots), None, None, None


class _Combine(torch.autograd.Function):
    """Sums each token's K rows; backward copies its gradient to them: `_Spread` reversed."""

    @staticmethod
    def forward(
        ctx: Any, rows_RH: Tensor, order_R: Tensor, inverse_R: Tensor, slots: int
    ) -> Tensor:
        ctx.save_for_backward(order_R)
        ctx.slots = slots
        return _Steps.sum_slots(rows_RH, inverse_R, slots)

    @staticmethod
    def backward(ctx: Any, grad_TH: Tensor) -> tuple[Tensor, None, None, None]:
        (order_R,) = ctx.saved_tensors
        return grad_TH.index_select(0, order_R // ctx.slots), None, None, None


class _Reorder(torch.autograd.Function):
    """values[order]; backward is the inverse gather, not a scatter-add."""

    @staticmethod
    def forward(ctx: Any, values_R: Tensor, order_R: Tensor, inverse_R: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_R)
        return values_R.index_select(0, order_R)

    @staticmethod
    def backward(ctx: Any, grad_R: Tensor) -> tuple[Tensor, None, None]:
        (inverse_R,) = ctx.saved_tensors
        return grad_R.index_select(0, inverse_R), None, None


def _apply(function: type[torch.autograd.Function], *inputs: Any) -> Tensor:
    """`function.apply`, with the type that torch leaves out."""
    return cast(Tensor, function.apply(*inputs))


def experts_forward(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Transformers' experts interface: (T,H), ids (T,K), weights (T,K) to (T,H)."""
    rows_TH, ids_TK = hidden_states, top_k_index
    slots = ids_TK.shape[1]
    # One-byte keys: a radix sort passes over the keys once, not eight times.
    sorted_R, order_R = ids_TK.reshape(-1).to(torch.uint8).sort()
    inverse_R = torch.empty_like(order_R)
    inverse_R[order_R] = torch.arange(order_R.numel(), device=order_R.device)
    gate_up_EIH = cast(Tensor, self.gate_up_proj)
    down_EHI = cast(Tensor, self.down_proj)
    experts_E = torch.arange(gate_up_EIH.shape[0], device=order_R.device, dtype=torch.uint8)
    ends_E = torch.searchsorted(sorted_R, experts_E, right=True, out_int32=True)

    spread_RH = _apply(_Spread, rows_TH, order_R, inverse_R, slots)
    both_RI = grouped_mm(spread_RH, gate_up_EIH.transpose(-2, -1), offs=ends_E)
    weights_R = _apply(_Reorder, top_k_weights.reshape(-1), order_R, inverse_R)
    narrow_RI = _Steps.activate(both_RI, weights_R)
    down_RH = grouped_mm(narrow_RI, down_EHI.transpose(-2, -1), offs=ends_E)
    return _apply(_Combine, down_RH, order_R, inverse_R, slots)


def register() -> None:
    """Makes the implementation known to Transformers' `set_experts_implementation`."""
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)


def fuse() -> None:
    """Compiles the memory-bound steps between the matrix products, for this process."""
    _Steps.sum_slots = staticmethod(torch.compile(_sum_slots, dynamic=False))
    _Steps.activate = staticmethod(torch.compile(_activate, dynamic=False))
