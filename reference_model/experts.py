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


def _sum_slots(rows_XD: Tensor, inverse_X: Tensor, slots: int) -> Tensor:
    """(X,D) sorted by expert to (T,D): each token's K rows, at `inverse_X`, added up."""
    return rows_XD.index_select(0, inverse_X).view(-1, slots, rows_XD.shape[-1]).sum(dim=1)


def _activate(both_XM: Tensor, weights_X: Tensor) -> Tensor:
    """SwiGLU of the joint gate and up projection, times the row's gate weight."""
    gate_XM, up_XM = both_XM.chunk(2, dim=-1)
    return silu(gate_XM) * up_XM * weights_X.to(both_XM.dtype).unsqueeze(-1)


class _Steps:
    """The steps between the matrix products; `fuse` replaces them by compiled versions."""

    sum_slots: Callable[[Tensor, Tensor, int], Tensor] = staticmethod(_sum_slots)
    activate: Callable[[Tensor, Tensor], Tensor] = staticmethod(_activate)


class _Spread(torch.autograd.Function):
    """Copies each token's row to its K slots, sorted by expert; backward sums the K rows."""

    @staticmethod
    def forward(
        ctx: Any, rows_TD: Tensor, order_X: Tensor, inverse_X: Tensor, slots: int
    ) -> Tensor:
        ctx.save_for_backward(inverse_X)
        ctx.slots = slots
        return rows_TD.index_select(0, order_X // slots)

    @staticmethod
    def backward(ctx: Any, grad_XD: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse_X,) = ctx.saved_tensors
        return _Steps.sum_slots(grad_XD, inverse_X, ctx.slots), None, None, None


class _Combine(torch.autograd.Function):
    """Sums each token's K rows; backward copies its gradient to them: `_Spread` reversed."""

    @staticmethod
    def forward(
        ctx: Any, rows_XD: Tensor, order_X: Tensor, inverse_X: Tensor, slots: int
    ) -> Tensor:
        ctx.save_for_backward(order_X)
        ctx.slots = slots
        return _Steps.sum_slots(rows_XD, inverse_X, slots)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None, None, None]:
        (order_X,) = ctx.saved_tensors
        return grad_TD.index_select(0, order_X // ctx.slots), None, None, None


class _Reorder(torch.autograd.Function):
    """values[order]; backward is the inverse gather, not a scatter-add."""

    @staticmethod
    def forward(ctx: Any, values_X: Tensor, order_X: Tensor, inverse_X: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_X)
        return values_X.index_select(0, order_X)

    @staticmethod
    def backward(ctx: Any, grad_X: Tensor) -> tuple[Tensor, None, None]:
        (inverse_X,) = ctx.saved_tensors
        return grad_X.index_select(0, inverse_X), None, None


def _apply(function: type[torch.autograd.Function], *inputs: Any) -> Tensor:
    """`function.apply`, with the type that torch leaves out."""
    return cast(Tensor, function.apply(*inputs))


def experts_forward(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Transformers' experts interface: (T,D), ids (T,K), weights (T,K) to (T,D)."""
    rows_TD, ids_TK = hidden_states, top_k_index
    slots = ids_TK.shape[1]
    # One-byte keys: a radix sort passes over the keys once, not eight times.
    sorted_X, order_X = ids_TK.reshape(-1).to(torch.uint8).sort()
    inverse_X = torch.empty_like(order_X)
    inverse_X[order_X] = torch.arange(order_X.numel(), device=order_X.device)
    gate_up_EMD = cast(Tensor, self.gate_up_proj)
    down_EDM = cast(Tensor, self.down_proj)
    experts_E = torch.arange(gate_up_EMD.shape[0], device=order_X.device, dtype=torch.uint8)
    ends_E = torch.searchsorted(sorted_X, experts_E, right=True, out_int32=True)

    spread_XD = _apply(_Spread, rows_TD, order_X, inverse_X, slots)
    both_XM = grouped_mm(spread_XD, gate_up_EMD.transpose(-2, -1), offs=ends_E)
    weights_X = _apply(_Reorder, top_k_weights.reshape(-1), order_X, inverse_X)
    narrow_XM = _Steps.activate(both_XM, weights_X)
    down_XD = grouped_mm(narrow_XM, down_EDM.transpose(-2, -1), offs=ends_E)
    return _apply(_Combine, down_XD, order_X, inverse_X, slots)


def register() -> None:
    """Makes the implementation known to Transformers' `set_experts_implementation`."""
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)


def fuse() -> None:
    """Compiles the memory-bound steps between the matrix products, for this process."""
    _Steps.sum_slots = staticmethod(torch.compile(_sum_slots, dynamic=False))
    _Steps.activate = staticmethod(torch.compile(_activate, dynamic=False))
