"""GPU experts: checked arguments in, two products and a sum out, as one op of torch."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from leanmoe.core.errors import LeanMoeError
from leanmoe.core.schema import from_json, to_json
from leanmoe.kernels.reference import check_call
from leanmoe.kernels.triton.config import MOST_DIRECT_TOKENS, ExpertsConfig
from leanmoe.kernels.triton.expert_blocks import ExpertBlocks, build_expert_blocks
from leanmoe.kernels.triton.launch import ExpertsCall, Operands, interprets, operands
from leanmoe.kernels.triton.state import power_of_two
from leanmoe.kernels.weights import SCALE_BLOCK, ExpertWeights, Gate

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
FP8 = torch.float8_e4m3fn
LEAST_FP8_DEPTH = 32


def experts_gpu_unsupported(weights: ExpertWeights) -> str | None:
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
    blocks: ExpertBlocks | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Each token's weighted sum over its experts, (T,D), as `experts_reference` gives it.

    With fp8 weights the hidden states and what lies between the products are made fp8, too, as
    DeepSeek-V3 was trained (4 to 5 % off), or the sum of two fp8 numbers, which is as exact as
    bf16 (the config's `fp8_terms`); or what lies between stays float16 (`float16_act`). It adds up
    in float32 and in the order of the slots: the same bits every time. It waits for nothing, so it
    can be captured in a graph. Ids are not checked for range.

    Args:
        blocks: the expert blocks of the same ids, where routing made them already, with the
            config's `block_rows`.
        out: where the result (T,D) goes. It must be contiguous and apart from the inputs;
            torch.compile cannot trace it.

    Raises LeanMoeError for what it cannot compute.
    """
    check_call(hidden_TD, ids_TK, weights_TK, weights)
    if reason := experts_gpu_unsupported(weights):
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
    _check_config(config, tokens, blocks, weights.gate_up_scale is not None)
    if blocks is None and not config.is_direct:
        blocks = build_expert_blocks(ids_TK, weights.experts, config.block_rows)
    grouped = [] if blocks is None or config.is_direct else list(blocks[:3])
    hidden, ids, gates = (t.contiguous() for t in (hidden_TD, ids_TK, weights_TK))
    layer = operands(weights)
    if out is not None:
        return _run(ExpertsCall(hidden, ids, gates, layer, config, out), grouped)
    result: Tensor = _experts_op(hidden, ids, gates, *layer, grouped, _as_text(config))
    return result


def _check_out(out: Tensor, hidden_TD: Tensor) -> None:
    if out.shape != hidden_TD.shape or out.dtype != hidden_TD.dtype or not out.is_contiguous():
        raise LeanMoeError(
            f"experts_gpu got a place for the result of shape {tuple(out.shape)}, {out.dtype}: it "
            f"must be contiguous, {tuple(hidden_TD.shape)} and {hidden_TD.dtype}"
        )


def _check_config(
    config: ExpertsConfig, tokens: int, blocks: ExpertBlocks | None, is_scaled: bool
) -> None:
    if config.is_direct and tokens > config.BLOCK_M:
        raise LeanMoeError(
            f"experts config is direct with {config.BLOCK_M} rows for {tokens} tokens: "
            f"rows must be at least the tokens, which may be {MOST_DIRECT_TOKENS} at most"
        )
    columns, depths = config.gate_up.BLOCK_N, [config.gate_up.BLOCK_K]
    if config.fused_sum and is_scaled and config.down.BLOCK_N > SCALE_BLOCK:
        raise LeanMoeError(
            f"experts config for fp8 sums the slots of {config.down.BLOCK_N} columns: "
            f"at most {SCALE_BLOCK}"
        )
    if not config.fused_sum:  # there each value has its own scale at hand
        depths.append(config.down.BLOCK_K)
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
    if not is_scaled and (config.fp8_terms == 2 or config.float16_act):
        name = "fp8_terms 2" if config.fp8_terms == 2 else "float16_act true"
        raise LeanMoeError(f"experts config has {name} for weights that are not fp8")
    if config.subblocks > 1 and is_scaled:
        raise LeanMoeError(
            f"experts config for fp8 has subblocks {config.subblocks}: it must be 1, "
            "other weights alone have more"
        )
    if blocks is not None and blocks.block_rows != config.block_rows:
        raise LeanMoeError(
            f"expert blocks have {blocks.block_rows} rows: the config wants {config.block_rows}"
        )


@lru_cache(maxsize=256)
def _as_text(config: ExpertsConfig) -> str:
    """The config as the op takes it; `_config` reads it."""
    return json.dumps(to_json(config))


@lru_cache(maxsize=256)
def _config(text: str) -> ExpertsConfig:
    return from_json(ExpertsConfig, json.loads(text), "experts config")


@torch.library.custom_op("leanmoe::experts_gpu", mutates_args=())
def _experts_op(
    hidden: Tensor, ids: Tensor, gates: Tensor,
    gate_up: Tensor, down: Tensor, gate_up_bias: Tensor | None, down_bias: Tensor | None,
    gate_up_scale: Tensor | None, down_scale: Tensor | None, is_transposed: bool,
    is_concatenated: bool, is_gated: bool, activation: int, limit: float, alpha: float,
    up_offset: float, blocks: list[Tensor], config: str,
) -> Tensor:  # fmt: skip
    layer = Operands(
        gate_up, down, gate_up_bias, down_bias, gate_up_scale, down_scale, is_transposed,
        is_concatenated, is_gated, activation, limit, alpha, up_offset,
    )  # fmt: skip
    return _run(ExpertsCall(hidden, ids, gates, layer, _config(config)), blocks)


def _run(call: ExpertsCall, blocks: list[Tensor]) -> Tensor:
    call.quantise()
    call.first_product(*blocks)
    call.second_product(*blocks)
    if not call.config.is_direct:
        call.sum_slots()
    return call.out


@_experts_op.register_fake
def _experts_fake(hidden: Tensor, *_rest: Any) -> Tensor:
    return torch.empty_like(hidden)


def silu_of_kept(
    gate_up_XM: Tensor, act_XM: Tensor, ids_TK: Tensor, local_of_E: Tensor | None
) -> None:
    """The activation of experts that are not leanmoe's, without the rows that nobody wrote.

    Writes silu(gate) * up to `act_XM` (X, M) for slots with an expert here; others stay.

    `gate_up_XM` (X, 2M) has each slot's gate before its up, `ids_TK` each slot's expert, below 0
    for none. `local_of_E` says where on this GPU an expert is, below 0 for elsewhere.
    """
    from leanmoe.kernels.triton.tile_program import silu_of_kept_rows

    rows, width = act_XM.shape
    local_E = ids_TK if local_of_E is None else local_of_E
    silu_of_kept_rows[(rows,)](
        gate_up_XM, act_XM, ids_TK, local_E, width,
        HAS_LOCAL=local_of_E is not None, BLOCK=power_of_two(width), num_warps=4,
    )  # fmt: skip
