"""Id -1 in skipped slots: whether SGLang's experts pass over it, tried on the device.

SGLang's Triton experts lay a step's slots out in blocks of one expert each. Slots of -1 get blocks
of their own, whose rows the kernel writes as zeros: no weight is read, nothing is multiplied
(`fused_moe_kernel`, 0.5.23: "Padding and nonlocal routes both use -1, including without EP").
None of this is promised, so it is tried when a model is loaded, with NaN in the weights of experts
that no slot names. Alignment has kernels of its own for few slots.

Letters: T tokens (rows of a step), E experts, K slots of a token, D hidden width, M expert width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

ROWS = (1, 5, 40, 700)
"""Rows of the steps that are tried."""
WIDTH = 128
"""D and M of the experts that are tried."""
TOLERANCE = 0.05
"""Of the largest output: two products in bfloat16 are nearer than that, a NaN or a wrong expert is
not."""
UNQUANTISED = "UnquantizedFusedMoEMethod"

Experts = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""`(hidden_TD, gate_up_EMD, down_EDM, ids_TK, weights_TK) -> out_TD`; gate_up has 2M rows."""


def not_minus_one_reason(topks: Iterable[Any], model: Any) -> str | None:
    """Why the skipped slots of these TopK modules cannot be -1; None if they can."""
    from sglang.srt.layers.moe.utils import get_moe_a2a_backend
    from sglang.srt.runtime_context import get_exec, get_lora

    for topk in topks:
        backend = topk.topk_config.runner_backend
        if backend is None or not backend.is_triton():
            return f"its experts are {backend}'s, not Triton's (--moe-runner-backend triton)"
    if not get_moe_a2a_backend().is_none():
        return "tokens are exchanged between ranks (--moe-a2a-backend none)"
    if get_lora().enable_lora:
        return "LoRA adapts its experts"
    if get_exec().features.enable_return_routed_experts:
        return "routed experts are returned (--enable-return-routed-experts)"
    methods = {
        type(module.quant_method).__name__
        for module in model.modules()
        if hasattr(module, "w13_weight") and hasattr(module, "quant_method")
    }
    if methods != {UNQUANTISED}:
        return f"its weights are quantised ({', '.join(sorted(methods))})"
    return None


def fails_on_minus_one(
    experts: Experts, count: int, slots: Iterable[int], device: torch.device | str
) -> str | None:
    """How `experts` do otherwise than pass over id -1; None if they do so in all steps tried."""
    generator = torch.Generator().manual_seed(0)
    gate_up_EMD = torch.randn(count, 2 * WIDTH, WIDTH, generator=generator) / WIDTH**0.5
    down_EDM = torch.randn(count, WIDTH, WIDTH, generator=generator) / WIDTH**0.5
    used = count - count // 4
    gate_up_EMD[used:], down_EDM[used:] = float("nan"), float("nan")
    weights = (gate_up_EMD.to(torch.bfloat16), down_EDM.to(torch.bfloat16))
    for number in sorted(set(slots)):
        for rows in ROWS:
            ids_TK = _drawn_ids(rows, min(number, used), used, generator)
            hidden_TD = torch.randn(rows, WIDTH, generator=generator).to(torch.bfloat16)
            shares_TK = torch.rand(ids_TK.shape, generator=generator)
            step = (hidden_TD, *weights, ids_TK, shares_TK)
            wanted_TD = looped_experts(*step)
            try:
                out_TD = experts(*(each.to(device) for each in step)).float().cpu()
            except Exception as error:  # an operator that is called in another way
                return f"its experts fail on id -1 ({type(error).__name__}: {error})"
            if not (out_TD - wanted_TD).abs().max() <= TOLERANCE * wanted_TD.abs().max():
                return f"its experts do not pass over id -1 in {rows} rows of {number} slots"
    return None


def _drawn_ids(rows: int, slots: int, experts: int, generator: torch.Generator) -> Tensor:
    """Ids (T,K), int32, of distinct experts, two in five of them -1; but for a step of one row the
    first row has none but -1, which a padding row has, too."""
    ids_TK = torch.rand(rows, experts, generator=generator).topk(slots).indices.int()
    ids_TK[torch.rand(ids_TK.shape, generator=generator) < 0.4] = -1
    if rows > 1:
        ids_TK[0] = -1
    else:
        ids_TK[0, 0] = 0
    return ids_TK


def looped_experts(
    hidden_TD: Tensor, gate_up_EMD: Tensor, down_EDM: Tensor, ids_TK: Tensor, shares_TK: Tensor
) -> Tensor:
    """The plain meaning of the experts, slot by slot, in float32."""
    out_TD = torch.zeros_like(hidden_TD, dtype=torch.float32)
    for expert in ids_TK.unique().tolist():
        if expert < 0:
            continue
        rows_X, slots_X = (ids_TK == expert).nonzero(as_tuple=True)
        gate, up = (hidden_TD[rows_X].float() @ gate_up_EMD[expert].float().T).chunk(2, dim=1)
        made = (functional.silu(gate) * up) @ down_EDM[expert].float().T
        out_TD.index_add_(0, rows_X, made * shares_TK[rows_X, slots_X].unsqueeze(1))
    return out_TD


def sglangs_experts(
    hidden_TD: Tensor, gate_up_EMD: Tensor, down_EDM: Tensor, ids_TK: Tensor, weights_TK: Tensor
) -> Tensor:
    """SGLang's Triton experts, as its `MoeRunner` calls them."""
    from sglang.srt.layers.moe.moe_runner.base import MoeRunnerConfig
    from sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe import fused_experts
    from sglang.srt.layers.moe.topk import StandardTopKOutput

    experts = gate_up_EMD.shape[0]
    config = MoeRunnerConfig(num_experts=experts, num_local_experts=experts, inplace=False)
    output: Tensor = fused_experts(
        hidden_TD, gate_up_EMD, down_EDM, StandardTopKOutput(weights_TK, ids_TK, weights_TK), config
    )
    return output
