"""The peers of `experts_gpu`: the same layer by torch, Transformers and vLLM.

Shapes: T tokens, K slots a token, E experts, D hidden width, M expert width.

vLLM picks its tiles from a table by shape and number of tokens. It has none for some of the shapes
measured here, so it is tuned first, over the settings that its own tables for this GPU hold.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

from leanmoe.kernels import ExpertWeights
from leanmoe.kernels.triton.timing import time_calls
from leanmoe.kernels.triton.tune_tiles import random_call, random_weights
from leanmoe.kernels.triton.tuned_tiles import Shape

Inputs = tuple[Tensor, Tensor, Tensor]
"""Hidden states (T,D), ids and weights (T,K)."""
Call = Callable[[], object]
STOCK = ("grouped_mm", "batched_mm")
MOST_GATHERED = 32
"""Tokens up to which batched_mm runs: it copies an expert's weights for every slot."""


def torch_grouped(inputs: Inputs, weights: ExpertWeights) -> Tensor:
    """The least that torch._grouped_mm needs around it: sort, two products, gate, sum."""
    hidden_TD, ids_TK, gates_TK = inputs
    slots = ids_TK.shape[1]
    sorted_X, order_X = ids_TK.flatten().sort()
    edges = torch.arange(weights.experts, device=ids_TK.device)
    ends_E = torch.searchsorted(sorted_X, edges, right=True).to(torch.int32)
    rows_XD = hidden_TD[order_X // slots]
    both = torch._grouped_mm(rows_XD, weights.gate_up.transpose(1, 2), offs=ends_E)
    gate, up = both.chunk(2, dim=-1)
    out_XD = torch._grouped_mm(
        functional.silu(gate) * up, weights.down.transpose(1, 2), offs=ends_E
    )
    placed_XD = torch.empty_like(out_XD)
    placed_XD[order_X] = out_XD * gates_TK.flatten()[order_X, None].to(out_XD.dtype)
    return placed_XD.view(*ids_TK.shape, -1).sum(dim=1)


class Stock:
    """Transformers' own implementations on the same weights."""

    def __init__(self, weights: ExpertWeights, slots: int) -> None:
        self.config = DeepseekV3Config(
            hidden_size=weights.hidden,
            moe_intermediate_size=weights.width,
            n_routed_experts=weights.experts,
            num_experts_per_tok=slots,
        )
        with torch.device("meta"):
            self.module = DeepseekV3MoE(self.config).experts
        self.module.gate_up_proj = nn.Parameter(weights.gate_up, requires_grad=False)
        self.module.down_proj = nn.Parameter(weights.down, requires_grad=False)

    def run(self, implementation: str, inputs: Inputs) -> Any:
        """One call."""
        self.config._experts_implementation = implementation
        return self.module(*inputs)


class Vllm:
    """vLLM's fused experts in Triton, with tiles tuned here."""

    def __init__(self, folder: Path | None) -> None:
        """`folder` holds an unpacked vLLM; None takes the installed one."""
        if folder is not None:
            sys.path.insert(0, str(folder))
        import vllm
        from vllm.model_executor.layers import fused_moe
        from vllm.model_executor.layers.fused_moe.config import fp8_w8a8_moe_quant_config

        self.version = vllm.__version__
        self._fused = fused_moe
        self._fp8 = fp8_w8a8_moe_quant_config
        self.chosen: dict[str, Any] = {}

    def compile(self, points: Sequence[tuple[Shape, int]]) -> None:
        """Compiles what `tune` will try at these shapes and tokens, a process for each core.

        Children are forked: vLLM takes a minute to import. So CUDA must not be in use yet.
        """
        if torch.cuda.is_initialized():
            print("vLLM: CUDA is in use already, so tiles are compiled one by one", flush=True)
            return
        context = multiprocessing.get_context("fork")
        parts = os.cpu_count() or 1
        children = [
            context.Process(target=self._compile_part, args=(points, part, parts))
            for part in range(parts)
        ]
        for child in children:
            child.start()
        for child in children:
            child.join()

    def _compile_part(self, points: Sequence[tuple[Shape, int]], part: int, parts: int) -> None:
        for shape, tokens in points:
            is_fp8 = "float8" in shape.dtype
            configs = list(candidates(tokens * shape.slots / shape.experts, is_fp8))
            mine = [c for c in configs if crc32(str(c).encode()) % parts == part]
            if not mine:
                continue
            weights, inputs = _of_one_expert(shape), random_call(shape, tokens, 0)
            for config in mine:
                try:
                    self.call(inputs, weights, config)()
                    torch.cuda.synchronize()
                except Exception as error:  # `tune` will say so
                    print(f"vLLM {shape}: {config}: {str(error)[:80]}", file=sys.stderr)

    def call(self, inputs: Inputs, weights: ExpertWeights, config: Any) -> Call:
        """One call with these tiles; None for those of vLLM's own tables."""
        hidden_TD, ids_TK, gates_TK = inputs
        ids_TK = ids_TK.to(torch.int32)
        quant = None
        if weights.gate_up_scale is not None:
            quant = self._fp8(weights.gate_up_scale, weights.down_scale, block_shape=[128, 128])
        fused_experts = self._fused.fused_moe.fused_experts

        def run() -> Any:
            with self._fused.override_config(config):
                return fused_experts(
                    hidden_TD, weights.gate_up, weights.down, gates_TK, ids_TK, quant_config=quant
                )

        return run

    def tune(self, name: str, inputs: list[Inputs], weights: ExpertWeights) -> Any:
        """The fastest tiles for these inputs, None where its own choice is."""
        tokens, slots = inputs[0][1].shape
        is_fp8 = weights.gate_up_scale is not None
        found: list[tuple[float, Any]] = []
        for config in (None, *candidates(tokens * slots / weights.experts, is_fp8)):
            try:
                calls = [self.call(i, weights, config) for i in inputs]
                found.append((time_calls(calls, replays=3), config))
            except Exception as error:  # tiles that do not fit this GPU
                print(f"vLLM {name}: {config} does not run: {str(error)[:80]}", file=sys.stderr)
        best = min(found, key=lambda pair: pair[0])[1]
        self.chosen[name] = best or "its own table or default"
        return best


def _of_one_expert(shape: Shape) -> ExpertWeights:
    """As many experts as there are, all of them the same memory."""
    one = random_weights(replace(shape, experts=1))
    named = {
        name: getattr(one, name).expand(shape.experts, -1, -1)
        for name in ("gate_up", "down", "gate_up_scale", "down_scale")
        if getattr(one, name) is not None
    }
    return replace(one, **named)


def candidates(rows: float, is_fp8: bool) -> Iterator[dict[str, int]]:
    """Tiles worth a try with so many rows an expert."""
    heights: tuple[int, ...]
    columns: tuple[int, ...]
    depths: tuple[int, ...]
    if is_fp8:
        heights, columns, depths = (16, 32, 64), (64, 128), (128,)
    elif rows < 24:
        heights, columns, depths = (16, 32), (64, 128), (64, 128, 256)
    else:
        heights, columns, depths = (64, 128), (128, 256), (64,)
    for height, width, depth, stages in itertools.product(heights, columns, depths, (3, 4)):
        if height > max(16, 4 * rows) or (height == 64 and rows < 24):
            continue
        if (height, width) == (16, 128) and depth == 256:
            continue
        for group in (1, 16) if rows >= 24 else (1,):
            yield {
                "BLOCK_SIZE_M": height,
                "BLOCK_SIZE_N": width,
                "BLOCK_SIZE_K": depth,
                "GROUP_SIZE_M": group,
                "SPLIT_K": 1,
                "num_warps": 8 if height * width >= 128 * 128 else 4,
                "num_stages": stages,
            }
