"""The experts in plain torch: what every faster implementation is checked against."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from leanmoe.core.errors import LeanMoeError
from leanmoe.kernels.weights import SCALE_BLOCK, ExpertWeights
from leanmoe.kernels.work import add_work


def experts_reference(
    hidden_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, weights: ExpertWeights
) -> Tensor:
    """Each token's weighted sum over its experts, (T,D) in the dtype of `hidden_TD`.

    An id equal to E is a skipped slot: no row is computed for it. Experts that no token uses are
    never read. Works for every layout, dtype and device. Rows are computed in the wider of the
    two dtypes and added up in float32 at least. Raises LeanMoeError for shapes that do not fit
    and for ids outside 0..E.
    """
    check_call(hidden_TD, ids_TK, weights_TK, weights)
    experts, slots = weights.experts, ids_TK.shape[1]
    sorted_X, order_X = ids_TK.reshape(-1).sort(stable=True)
    if sorted_X.numel() and not 0 <= int(sorted_X[0]) <= int(sorted_X[-1]) <= experts:
        refuse_ids(int(sorted_X[0]), int(sorted_X[-1]), experts)
    counts: list[int] = torch.bincount(sorted_X, minlength=experts)[:experts].tolist()

    compute = hidden_TD.dtype
    if weights.gate_up_scale is None:
        compute = torch.promote_types(compute, weights.gate_up.dtype)
    total_TD = torch.zeros_like(
        hidden_TD,
        dtype=torch.promote_types(compute, torch.float32),
        memory_format=torch.contiguous_format,
    )
    gates_X = weights_TK.reshape(-1).to(total_TD.dtype)
    start = rows = distinct = 0
    for expert, count in enumerate(counts):
        if not count:
            continue
        slots_X = order_X[start : start + count]
        tokens_X = slots_X // slots
        out_XD = expert_rows(hidden_TD[tokens_X].to(compute), expert, weights)
        total_TD.index_add_(0, tokens_X, out_XD.to(total_TD.dtype) * gates_X[slots_X, None])
        start, rows, distinct = start + count, rows + count, distinct + 1
    add_work(rows, distinct)
    return total_TD.to(hidden_TD.dtype)


def check_call(
    hidden_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, weights: ExpertWeights
) -> None:
    """Raises LeanMoeError unless the three tensors fit each other and the weights."""
    if hidden_TD.dim() != 2 or hidden_TD.shape[1] != weights.hidden:
        raise LeanMoeError(
            f"experts got hidden states of shape {tuple(hidden_TD.shape)}: "
            f"they must be (tokens, {weights.hidden})"
        )
    if ids_TK.dim() != 2 or ids_TK.shape[0] != hidden_TD.shape[0]:
        raise LeanMoeError(
            f"experts got ids of shape {tuple(ids_TK.shape)}: "
            f"they must be ({hidden_TD.shape[0]}, slots)"
        )
    if weights_TK.shape != ids_TK.shape:
        raise LeanMoeError(
            f"experts got routing weights of shape {tuple(weights_TK.shape)}: "
            f"they must be {tuple(ids_TK.shape)}, one for each id"
        )


def refuse_ids(least: int, most: int, experts: int) -> None:
    """The error for expert ids out of range."""
    wrong = least if least < 0 else most
    raise LeanMoeError(
        f"an expert id is {wrong}: it must be 0 to {experts - 1}, or {experts} for a skipped slot"
    )


def expert_rows(rows_XD: Tensor, expert: int, weights: ExpertWeights) -> Tensor:
    """What one expert makes of rows (X,D), before the routing weight; in the rows' dtype."""
    up = _matrix(expert, weights.gate_up, weights.gate_up_scale, rows_XD.dtype, weights)
    product_XJ = functional.linear(rows_XD, up, _bias(expert, weights.gate_up_bias, up.dtype))
    activated_XM = weights.activated(product_XJ)
    down = _matrix(expert, weights.down, weights.down_scale, rows_XD.dtype, weights)
    out_XD = functional.linear(activated_XM, down, _bias(expert, weights.down_bias, up.dtype))
    return out_XD if weights.after is None else weights.after(out_XD)


def _matrix(
    expert: int, weight: Tensor, scale: Tensor | None, dtype: torch.dtype, weights: ExpertWeights
) -> Tensor:
    """One expert's matrix as `functional.linear` takes it, its block scales multiplied in."""
    matrix = weight[expert]
    if scale is not None:
        blocks = scale[expert].double()
        for axis in (0, 1):
            blocks = blocks.repeat_interleave(SCALE_BLOCK, axis)
        matrix = matrix.double() * blocks[: matrix.shape[0], : matrix.shape[1]]
    matrix = matrix.to(dtype)
    return matrix.transpose(0, 1) if weights.is_transposed else matrix


def _bias(expert: int, bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if bias is None else bias[expert].to(dtype)
