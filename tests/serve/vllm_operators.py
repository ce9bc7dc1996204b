"""vLLM's operators for Triton experts, and those experts, in plain torch, which a CPU can run.

What each version does was read in its source: 0.24.0, 0.26.0 and 0.33.0
(`model_executor/layers/fused_moe`, `_custom_ops.py`). Letters: T tokens, K slots, E experts, D
hidden width, M expert width.
"""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.serve.stand_ins import loaded_runner

MOE = "vllm.model_executor.layers.fused_moe"
VERSIONS = ("0.26", "0.33")
"""The versions whose operators leave out ids below 0."""


def align(
    topk_ids: Tensor,
    block_size: int,
    num_experts: int,
    expert_map: Tensor | None = None,
    pad_sorted_ids: bool = False,
    ignore_invalid_experts: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Slots by expert, the expert of each block, and how many rows all blocks have; drops -1."""
    del pad_sorted_ids
    ids, order, experts = topk_ids.view(-1).tolist(), [], []
    if ignore_invalid_experts and expert_map is not None:
        ids = [-1 if e < 0 else int(expert_map[e]) for e in ids]
    for expert in range(num_experts):
        mine = [slot for slot, e in enumerate(ids) if e == expert]
        mine += [len(ids)] * (-len(mine) % block_size)
        order += mine
        experts += [expert] * (len(mine) // block_size)
    count = torch.tensor([len(order)], dtype=torch.int32)
    spare = [len(ids)] * block_size  # vLLM's buffers are longer than what is in them
    blocks = torch.tensor([*experts, 0], dtype=torch.int32)
    if expert_map is not None and not ignore_invalid_experts:
        blocks = expert_map[blocks.long()]
    return torch.tensor(order + spare, dtype=torch.int32), blocks, count


def align_of_0_24(
    topk_ids: Tensor, block_size: int, num_experts: int, expert_map: Tensor | None = None
) -> Any:
    """Counts -1 outside of its memory."""
    assert bool((topk_ids >= 0).all()), "this would have broken the GPU's context"
    return align(topk_ids, block_size, num_experts, expert_map)


def align_that_wraps(
    topk_ids: Tensor, block_size: int, num_experts: int, expert_map: Tensor | None = None
) -> Any:
    """Takes -1 for the last expert."""
    return align(topk_ids % num_experts, block_size, num_experts, expert_map)


def sum_of_0_24(input: Tensor, output: Tensor) -> None:
    """Adds up all slots."""
    output.copy_(input.sum(1))


def pad_aware_sum(
    input: Tensor,
    output: Tensor,
    topk_ids: Tensor | None = None,
    expert_map: Tensor | None = None,
) -> None:
    """Leaves out slots below 0 and those of experts elsewhere, where it is told of them."""
    if topk_ids is not None:
        local = topk_ids if expert_map is None else expert_map[topk_ids.clamp_min(0).long()]
        input = input.masked_fill(((topk_ids < 0) | (local < 0))[..., None], 0)
    output.copy_(input.sum(1))


def deaf_sum(
    input: Tensor,
    output: Tensor,
    topk_ids: Tensor | None = None,
    expert_map: Tensor | None = None,
) -> None:
    """Takes ids and does not heed them."""
    del topk_ids, expert_map
    output.copy_(input.sum(1))


def install_operators(
    monkeypatch: pytest.MonkeyPatch,
    alignment: Any = align,
    moe_sum: Any = pad_aware_sum,
    version: str = "0.33",
) -> None:
    """Makes vLLM's modules of these operators importable."""
    operators = ModuleType("vllm._custom_ops")
    operators.moe_sum = moe_sum  # type: ignore[attr-defined]
    functions = ModuleType(f"{MOE}.fused_moe")
    triton_moe = ModuleType(f"{MOE}.experts.triton_moe")

    def assign(
        topk_ids: Tensor,
        config: dict[str, Any],
        num_tokens: int,
        top_k_num: int,
        global_num_experts: int,
        expert_map: Tensor | None,
        *,
        block_shape: list[int] | None = None,
    ) -> Any:
        del block_shape
        if expert_map is None and num_tokens * top_k_num * 4 <= global_num_experts:
            return None, topk_ids.view(-1), torch.tensor([topk_ids.numel()])
        step = (topk_ids, config["BLOCK_SIZE_M"], global_num_experts, expert_map)
        return functions.moe_align_block_size(*step)

    def assign_of_0_33(
        topk_ids: Tensor,
        config: dict[str, Any],
        num_tokens: int,
        top_k_num: int,
        global_num_experts: int,
        expert_map: Tensor | None,
        *,
        block_shape: list[int] | None = None,
        ignore_invalid_experts: bool = False,
        weights_host_resident: bool = False,
    ) -> Any:
        if not ignore_invalid_experts and not weights_host_resident:
            step = (topk_ids, config, num_tokens, top_k_num, global_num_experts, expert_map)
            return assign(*step, block_shape=block_shape)
        return functions.moe_align_block_size(
            topk_ids, config["BLOCK_SIZE_M"], global_num_experts, expert_map,
            ignore_invalid_experts=ignore_invalid_experts,
        )  # fmt: skip

    used: Any = assign_of_0_33 if version == "0.33" else assign
    used.__module__ = functions.__name__
    functions._prepare_expert_assignment = used  # type: ignore[attr-defined]
    functions.moe_align_block_size = alignment  # type: ignore[attr-defined]
    functions.fused_moe_kernel = fused_moe_kernel  # type: ignore[attr-defined]
    triton_moe._prepare_expert_assignment = used  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm._custom_ops", operators)
    monkeypatch.setitem(sys.modules, functions.__name__, functions)
    monkeypatch.setitem(sys.modules, triton_moe.__name__, triton_moe)


def fused_moe_kernel(off_experts: int, write_zeros_to_output: Any) -> int:
    """As far as the plugin reads it."""
    if off_experts == -1:
        write_zeros_to_output(0)
        return 0
    return off_experts


class TritonExperts:
    """vLLM's Triton experts: blocks are multiplied, rows that no block has stay as they were."""

    __module__ = f"{MOE}.experts.triton_moe"

    def __init__(self, version: str, **settings: Any) -> None:
        config = loaded_runner(**settings).routed_experts.quant_method.moe_kernel.fused_experts
        self.quant_config, self._version = config.quant_config, version

    def apply(
        self,
        output: Tensor,
        hidden_states: Tensor,
        w1: Tensor,
        w2: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        expert_map: Tensor | None,
    ) -> None:
        """Writes each token's weighted sum (T,D) to `output`."""
        is_new = self._version == "0.33"
        told = {"ignore_invalid_experts": expert_map is not None} if is_new else {}
        if is_new:
            told["weights_host_resident"] = getattr(w1, "_vllm_is_uva_offloaded", False)
        rows, slots = topk_ids.shape
        experts = w1.shape[0] if expert_map is None else expert_map.shape[0]
        assign = sys.modules[self.__module__]._prepare_expert_assignment
        order, blocks, count = assign(
            topk_ids, {"BLOCK_SIZE_M": 16}, rows, slots, experts, expert_map, **told
        )
        if order is None:
            order, of_slot = torch.arange(rows * slots), blocks
        else:
            of_slot = blocks.repeat_interleave(16)[: int(count)]
        places = [
            (slot, expert)
            for slot, expert in zip(order.tolist(), of_slot.tolist(), strict=False)
            if slot < rows * slots
        ]
        nan = float("nan")  # workspaces are not cleared
        first = torch.full((rows * slots, w1.shape[1]), nan)
        second, third = (
            first.new_full((len(first), w2.shape[2]), nan),
            first[:, : w2.shape[1]] * nan,
        )
        for slot, expert in places:
            first[slot] = 0 if expert < 0 else w1[expert] @ hidden_states[slot // slots]
        self.activation(None, second, first)
        for slot, expert in places:
            weighted = topk_weights.view(-1)[slot] * (w2[expert] @ second[slot])
            third[slot] = 0 if expert < 0 else weighted
        cache = third.view(rows, slots, -1)
        if is_new:
            self.moe_sum(cache, output, topk_ids, expert_map)
        else:
            self.moe_sum(cache, output)

    def activation(self, activation: Any, output: Tensor, input: Tensor) -> None:
        """silu(gate) * up of all rows."""
        del activation
        gate, up = input.chunk(2, dim=1)
        output.copy_(functional.silu(gate.float()).to(input.dtype) * up)

    def moe_sum(
        self,
        input: Tensor,
        output: Tensor,
        topk_ids: Tensor | None = None,
        expert_map: Tensor | None = None,
    ) -> None:
        """Tells the operator of ids only with expert parallelism, and only where it has them."""
        operator = sys.modules["vllm._custom_ops"].moe_sum
        if expert_map is not None:
            operator(input, output, topk_ids, expert_map)
        else:
            operator(input, output)


def triton_runner(
    version: str = "0.33", experts: int = 64, width: int = 8, **settings: Any
) -> SimpleNamespace:
    """A MoE layer of Triton experts, loaded, with drawn weights of its experts on this GPU."""
    runner = loaded_runner(**settings)
    loaded = TritonExperts(version, **settings)
    kernel = runner.routed_experts.quant_method.moe_kernel
    kernel.fused_experts = kernel.impl.fused_experts = loaded
    generator = torch.Generator().manual_seed(7)
    layer = runner.routed_experts
    layer.w13_weight = torch.randn(experts, 2 * width, width, generator=generator)
    layer.w2_weight = torch.randn(experts, width, width, generator=generator)
    return runner
