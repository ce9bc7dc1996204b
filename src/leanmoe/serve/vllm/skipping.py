"""How a layer's skipped slots are written, by what the experts that vLLM loaded do with them.

vLLM's Triton experts group a step's slots by expert: a skipped slot that repeats the token's best
expert joins a group that is there anyway. But where a step's slots are few (`is_small`) they are
not grouped: each is computed by itself and reads its expert's weights, a repeated one too. There
the kernel takes a slot's id as it stands, writes zeros for -1 and reads nothing (vLLM's
`_prepare_expert_assignment` and `fused_moe_kernel`, read in 0.24.0 and 0.32.0). Grouping has no
such promise for -1, so larger steps never have it; nor have small ones that are grouped
(`grouping.py`).

Letters: T rows of a step, K slots a token, E experts.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch

from leanmoe.plan import Rule
from leanmoe.serve.skipped_slots import Skipped
from leanmoe.serve.vllm.checks import experts_class

SHARE = 4
"""A step is small if its slots are at most one in so many of the experts."""
TRITON = ("vllm.model_executor.layers.fused_moe.experts.triton_moe", "TritonExperts")
"""The class whose steps these are; its subclasses do more, and are not trusted with -1."""
FUNCTIONS = "vllm.model_executor.layers.fused_moe.fused_moe"
BRANCH = "if off_experts == -1:"
"""In vLLM's kernel, where a slot is passed over."""


@dataclass(frozen=True)
class Skipping:
    """How one layer's skipped slots are written."""

    usual: Skipped = Skipped.REPEATED
    small: Skipped = Skipped.REPEATED
    """In small steps."""
    groups: bool = False
    """Whether small steps are grouped under rules by which tokens share experts."""

    def of(self, rows: int, slots: int, experts: int) -> Skipped:
        """How they are written in a step of `rows` rows, each with `slots` slots."""
        return self.small if is_small(rows, slots, experts) else self.usual

    def is_grouped(self, rule: Rule, rows: int, slots: int, experts: int) -> bool:
        """Whether that step is a small one to be grouped, skipped slots as in larger steps."""
        is_shared = rule.is_batch_aware and rows > 1
        return self.groups and is_shared and is_small(rows, slots, experts)

    def describe(self) -> str:
        """As the log has it."""
        if self.small is self.usual:
            return self.usual.value
        grouped = ", or grouped where tokens share experts" if self.groups else ""
        return f"{self.usual.value}; in small steps {self.small.value}{grouped}"


def is_small(rows: int, slots: int, experts: int) -> bool:
    """Whether vLLM's Triton experts compute each slot of a step by itself."""
    return rows * slots * SHARE <= experts


def why_not_skip(runner: Any, slots: Iterable[int], experts: int) -> str | None:
    """Why small steps of a loaded layer cannot have -1 in skipped slots; None if they can.

    `slots` are the K of the layer's rules. Asks vLLM's own code, since it may change: that it
    takes the largest small steps slot by slot, and that its kernel passes over -1.
    """
    reason = why_not_plain_triton(runner)
    if reason is not None:
        return reason
    config = runner.routed_experts.quant_method.moe_kernel.fused_experts.quant_config
    if config.use_int8_w8a16 or config.use_int4_w4a16:
        return "its weights are integers"
    functions = import_module(FUNCTIONS)
    for number in sorted(set(slots)):
        rows = experts // (SHARE * number) if number else 0
        if rows and not takes_slots_alone(functions, rows, number, experts):
            return "this vLLM groups the slots of small steps"
    if not passes_over(functions):
        return "this vLLM's kernel does not pass over -1"
    return None


def why_not_plain_triton(runner: Any) -> str | None:
    """Why a loaded layer is not vLLM's Triton experts alone, all of them on this GPU."""
    layer = runner.routed_experts
    found = experts_class(layer.quant_method)
    if (found.__module__, found.__name__) != TRITON:
        return f"its experts are {found.__name__}"
    if runner.moe_config.is_lora_enabled:
        return "it has LoRA"
    if layer.expert_map is not None:
        return "its experts are on several GPUs"
    if runner.router.eplb_state is not None:
        return "its experts are balanced over GPUs"
    if runner.moe_config.dp_size > 1 or runner.moe_config.pcp_size > 1:
        return "its tokens are gathered from several GPUs"
    if runner.moe_config.is_sequence_parallel:
        return "its tokens are divided over GPUs"
    return None


def takes_slots_alone(functions: Any, rows: int, slots: int, experts: int) -> bool:
    """Whether vLLM gives its kernel the ids of such a step as they stand."""
    ids_TK = torch.full((rows, slots), -1, dtype=torch.int32)
    try:
        order, found, _rows = functions._prepare_expert_assignment(
            ids_TK, {"BLOCK_SIZE_M": 16}, rows, slots, experts, None
        )
    except Exception:  # it groups them, for which it wants a GPU, or is called in another way
        return False
    return order is None and bool(torch.equal(found, ids_TK.view(-1)))


def passes_over(functions: Any) -> bool:
    """Whether vLLM's kernel has the branch that writes zeros for -1 and ends."""
    kernel = functions.fused_moe_kernel
    _, found, after = inspect.getsource(getattr(kernel, "fn", kernel)).partition(BRANCH)
    ends = after.partition("return")[0]
    return bool(found) and "write_zeros_to_output(" in ends and "tl.load" not in ends
