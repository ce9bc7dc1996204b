"""GPU experts: checked arguments in, two products and a sum out, as one op of torch.

Letters: T tokens, K slots a token, N = T*K slots, E experts, D hidden width, M expert width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from leanmoe.core.errors import LeanMoeError
from leanmoe.kernels.reference import check_call
from leanmoe.kernels.triton.config import MOST_DIRECT_TOKENS, ExpertsConfig, Tile
from leanmoe.kernels.triton.expert_blocks import WorkList, build_expert_blocks
from leanmoe.kernels.triton.launch import ExpertsCall, interprets
from leanmoe.kernels.weights import ACTIVATIONS, SCALE_BLOCK, ExpertWeights, Gate

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
FP8 = torch.float8_e4m3fn
LEAST_FP8_DEPTH = 32


def why_not_gpu(weights: ExpertWeights) -> str | None:
    """Why `experts_gpu` cannot compute these weights; None if it can."""
    tensor, other = weights.gate_up, weights.down
    if tensor.device.type != "cuda" and not interprets():
        return f"the weights are on {tensor.device}"
    if tensor.dtype != other.dtype or tensor.dtype not in (*FLOATS, FP8):
        return f"no kernel for {tensor.dtype} and {other.dtype} weights"
    if (tensor.dtype == FP8) != (weights.gate_up_scale is not None):
        return "fp8 weights need block scales, and only they"
    if not isinstance(weights.gate, Gate):
        return "the gate is a function of the model's own"
    if weights.after is not None:
        return "the experts end in a function of the model's own"
    if not (tensor.is_contiguous() and other.is_contiguous()):
        return "the weights are not contiguous"
    return None


def experts_gpu(
    hidden_TD: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    weights: ExpertWeights,
    *,
    config: ExpertsConfig | None = None,
    work: WorkList | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Each token's weighted sum over its experts, (T,D), as `experts_reference` gives it.

    With fp8 weights the hidden states and what lies between the products are made fp8, too, as
    DeepSeek-V3 was trained (4 to 5 % off), or the sum of two fp8 numbers, which is as exact as
    bf16 (the config's `parts`); or what lies between stays float16 (`float16_act`). Adds up in
    float32 and in the order of the slots: the same bits every time. Waits for nothing, so it can be
    captured in a graph. Ids are not checked for range. `work` is the work list of the same ids,
    where routing made it already, with the config's `block_rows`. `out` (T,D) is where the result
    goes, for who has a place for it; it must be contiguous and apart from the inputs, and
    torch.compile cannot trace that. Raises LeanMoeError for what it cannot compute.
    """
    check_call(hidden_TD, ids_TK, weights_TK, weights)
    if reason := why_not_gpu(weights):
        raise LeanMoeError(f"experts_gpu cannot compute these experts: {reason}")
    if weights.gate_up.dtype not in (hidden_TD.dtype, FP8) or hidden_TD.dtype not in FLOATS:
        raise LeanMoeError(
            f"experts_gpu got {hidden_TD.dtype} hidden states for {weights.gate_up.dtype} "
            "weights: they must be of one dtype, or the weights fp8"
        )
    tokens, slots = ids_TK.shape
    if out is not None:
        _check_out(out, hidden_TD)
    if tokens * slots == 0:
        return torch.zeros_like(hidden_TD) if out is None else out.zero_()
    if config is None:
        from leanmoe.kernels.triton.tuned_tiles import config_for

        config = config_for(weights, tokens, slots)
    _check_config(config, tokens, work, weights.gate_up_scale is not None)
    if work is None and not config.is_direct:
        work = build_expert_blocks(ids_TK, weights.experts, config.block_rows)
    extras, listed, *gate = operands(weights, work if not config.is_direct else None)
    hidden, ids, gates = (t.contiguous() for t in (hidden_TD, ids_TK, weights_TK))
    inputs = (hidden, ids, gates, weights.gate_up, weights.down, extras)
    if out is not None:
        layout, activation, numbers = gate
        return _run(ExpertsCall(*inputs, layout, activation, numbers, config, out), listed)
    found: Tensor = _experts_op(*inputs, listed, *gate, _numbers(config))
    return found


def operands(weights: ExpertWeights, work: WorkList | None) -> tuple[Any, ...]:
    """Biases and scales, work list, layout, activation and its numbers, as the op takes them."""
    gate = weights.gate
    assert isinstance(gate, Gate)
    return (
        [weights.gate_up_bias, weights.down_bias, weights.gate_up_scale, weights.down_scale],
        [] if work is None else list(work[:3]),
        [weights.is_transposed, weights.is_concatenated, weights.is_gated],
        list(ACTIVATIONS).index(gate.activation),
        [float("inf") if gate.limit is None else gate.limit, gate.alpha, gate.up_offset],
    )


def _check_out(out: Tensor, hidden_TD: Tensor) -> None:
    if out.shape != hidden_TD.shape or out.dtype != hidden_TD.dtype or not out.is_contiguous():
        raise LeanMoeError(
            f"experts_gpu got a place for the result of shape {tuple(out.shape)}, {out.dtype}: it "
            f"must be contiguous, {tuple(hidden_TD.shape)} and {hidden_TD.dtype}"
        )


def _check_config(
    config: ExpertsConfig, tokens: int, work: WorkList | None, is_scaled: bool
) -> None:
    if config.is_direct and tokens > config.rows:
        raise LeanMoeError(
            f"experts config is direct with {config.rows} rows for {tokens} tokens: "
            f"rows must be at least the tokens, which may be {MOST_DIRECT_TOKENS} at most"
        )
    columns, depths = config.gate_up.columns, [config.gate_up.depth]
    if config.is_joined and is_scaled and config.down.columns > SCALE_BLOCK:
        raise LeanMoeError(
            f"experts config for fp8 joins {config.down.columns} columns: at most {SCALE_BLOCK}"
        )
    if not config.is_joined:  # there each value has its own scale at hand
        depths.append(config.down.depth)
    if is_scaled and (max(depths) > SCALE_BLOCK or depths[-1] > columns):
        raise LeanMoeError(
            f"experts config for fp8 reads {tuple(depths)} columns a step: at most {SCALE_BLOCK} "
            f"have one scale, and in the second product no more than the first's {columns} columns"
        )
    if is_scaled and min(depths) < LEAST_FP8_DEPTH:
        raise LeanMoeError(
            f"experts config for fp8 reads {min(depths)} columns a step: the matrix unit takes "
            f"{LEAST_FP8_DEPTH} at least"
        )
    if config.parts == 2 and not is_scaled:
        raise LeanMoeError("experts config makes activations of 2 fp8 parts for other weights")
    if config.float16_act and not is_scaled:
        raise LeanMoeError("experts config has float16_act true for weights that are not fp8")
    if config.pieces > 1 and is_scaled:
        raise LeanMoeError(
            f"experts config for fp8 has pieces {config.pieces}: it must be 1, other weights alone "
            "have more"
        )
    if work is not None and work.block_rows != config.block_rows:
        raise LeanMoeError(
            f"work list has blocks of {work.block_rows} rows: the config wants {config.block_rows}"
        )


def _numbers(config: ExpertsConfig) -> list[int]:
    """The config as the op takes it."""
    tiles = [
        int(n)
        for t in (config.gate_up, config.down)
        for n in (t.columns, t.depth, t.warps, t.stages, t.group, t.weights_left, t.described)
    ]
    ways = (config.is_direct, config.overlap, config.is_joined)
    counts = (config.parts, config.pieces, config.float16_act)
    return [config.rows, config.tail, *ways, *counts, *tiles]


def _config(numbers: list[int]) -> ExpertsConfig:
    rows, tail, direct, overlap, joined, *numbers = numbers
    parts, pieces, is_float16, *rest = numbers
    first, second = (_tile(t) for t in (rest[: len(rest) // 2], rest[len(rest) // 2 :]))
    flags = (bool(overlap), bool(joined))
    return ExpertsConfig(
        rows, tail, bool(direct), first, second, *flags, parts, pieces, bool(is_float16)
    )


def _tile(numbers: list[int]) -> Tile:
    columns, depth, warps, stages, group, left, described = numbers
    return Tile(columns, depth, warps, stages, group, bool(left), bool(described))


@torch.library.custom_op("leanmoe::experts_gpu", mutates_args=())
def _experts_op(
    hidden: Tensor,
    ids: Tensor,
    gates: Tensor,
    gate_up: Tensor,
    down: Tensor,
    extras: list[Tensor | None],
    work: list[Tensor],
    layout: list[bool],
    activation: int,
    numbers: list[float],
    config: list[int],
) -> Tensor:
    call = ExpertsCall(
        hidden, ids, gates, gate_up, down, extras, layout, activation, numbers, _config(config)
    )
    return _run(call, work)


def _run(call: ExpertsCall, work: list[Tensor]) -> Tensor:
    call.quantise()
    call.first_product(*work)
    call.second_product(*work)
    if not call.config.is_direct:
        call.sum_slots()
    return call.out


@_experts_op.register_fake
def _experts_fake(hidden: Tensor, *_rest: Any) -> Tensor:
    return torch.empty_like(hidden)
