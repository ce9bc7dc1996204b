"""The experts in plain torch: what every faster implementation is checked against.

Shapes: T tokens, K slots a token, E experts, M expert width, D hidden width, R rows of one expert.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from leanmoe.errors import LeanMoeError
from leanmoe.kernels.weights import ExpertWeights
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
    sorted_S, order_S = ids_TK.reshape(-1).sort(stable=True)
    if sorted_S.numel() and not 0 <= int(sorted_S[0]) <= int(sorted_S[-1]) <= experts:
        refuse_ids(int(sorted_S[0]), int(sorted_S[-1]), experts)
    counts: list[int] = torch.bincount(sorted_S, minlength=experts)[:experts].tolist()

    compute = torch.promote_types(hidden_TD.dtype, weights.gate_up.dtype)
    total_TD = torch.zeros_like(
        hidden_TD,
        dtype=torch.promote_types(compute, torch.float32),
        memory_format=torch.contiguous_format,
    )
    gates_S = weights_TK.reshape(-1).to(total_TD.dtype)
    start = rows = distinct = 0
    for expert, count in enumerate(counts):
        if not count:
            continue
        slots_R = order_S[start : start + count]
        tokens_R = slots_R // slots
        out_RD = _expert(hidden_TD[tokens_R].to(compute), expert, weights)
        total_TD.index_add_(0, tokens_R, out_RD.to(total_TD.dtype) * gates_S[slots_R, None])
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


def _expert(rows_RD: Tensor, expert: int, weights: ExpertWeights) -> Tensor:
    product_RN = _linear(rows_RD, expert, weights.gate_up, weights.gate_up_bias, weights)
    activated_RM = weights.activated(product_RN)
    out_RD = _linear(activated_RM, expert, weights.down, weights.down_bias, weights)
    return out_RD if weights.after is None else weights.after(out_RD)


def _linear(
    rows: Tensor, expert: int, weight: Tensor, bias: Tensor | None, weights: ExpertWeights
) -> Tensor:
    matrix = weight[expert].to(rows.dtype)
    if weights.is_transposed:
        matrix = matrix.transpose(0, 1)
    return functional.linear(rows, matrix, None if bias is None else bias[expert].to(rows.dtype))
