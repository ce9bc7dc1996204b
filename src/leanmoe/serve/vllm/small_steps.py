"""How skipped slots are written, and small steps grouped, for the experts that vLLM loaded.

vLLM's Triton experts group a step's slots by expert. Where vLLM's operators pass over id -1 there
(`skipped_slots`), every skipped slot has it. Else a skipped slot repeats the token's best expert
and joins a group that is there anyway. But where a step's slots are few (`is_small`) they are not
grouped: each is computed by itself and reads its expert's weights, a repeated one too. There the
kernel takes a slot's id as it stands, writes zeros for -1 and reads nothing (vLLM's
`_prepare_expert_assignment` and `fused_moe_kernel`, read in 0.24.0 and 0.32.0).

Slot by slot, an expert that three tokens use is read three times. That costs the full model little,
whose few tokens hardly meet, and costs batch-aware rules all that they gain. So small steps of such
rules are grouped, too, by vLLM's own `moe_align_block_size`: one short launch more. Nothing depends
on it but time.

Letters: T tokens (rows of a step), E experts, K slots of a token.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from leanmoe.plan import Rule
from leanmoe.serve.vllm.checks import triton_unsupported_reason
from leanmoe.serve.vllm.skipped_slots import (
    ALIGN,
    ASSIGN,
    MODULE,
    SkippingActivation,
    SkippingSum,
    alignment,
)

SHARE = 4
"""A step is small if its slots are at most one in so many of the experts."""
FUNCTIONS = "vllm.model_executor.layers.fused_moe.fused_moe"
HOST_RESIDENT = "weights_host_resident"
"""The word by which vLLM 0.33 and newer are told of weights in host memory."""
BRANCH = "if off_experts == -1:"
"""In vLLM's kernel, where a slot is passed over."""


class Skipped(Enum):
    """What stands in a skipped slot; its weight is 0 in any case."""

    REPEATED = "the token's best expert again, weight 0"
    """Suits kernels that want an expert in every slot."""
    MINUS_ONE = "id -1"
    """Suits kernels that pass over such a slot."""
    BEYOND = "passed over by leanmoe's experts"
    """The id is E: leanmoe's own kernels pass over it."""

    def id(self, experts: int) -> int | None:
        """The id of a slot that is passed over; None where the token's best is repeated."""
        return {Skipped.REPEATED: None, Skipped.MINUS_ONE: -1, Skipped.BEYOND: experts}[self]


@dataclass(frozen=True)
class Skipping:
    """How one layer's skipped slots are written, and whether its small steps are grouped."""

    usual: Skipped = Skipped.REPEATED
    small: Skipped = Skipped.REPEATED
    """What stands in the skipped slots of small steps that are not grouped."""
    groups: bool = False
    """Whether small steps of several rows are grouped under batch-aware rules."""

    def in_step(self, rule: Rule, rows: int, slots: int, experts: int) -> Skipped:
        """What stands in the skipped slots of a step of `rows` rows, each with `slots` slots."""
        if self.is_grouped(rule, rows, slots, experts) or not is_small(rows, slots, experts):
            return self.usual
        return self.small

    def is_grouped(self, rule: Rule, rows: int, slots: int, experts: int) -> bool:
        """Whether such a step is grouped though small; its skipped slots are as in larger steps."""
        may_share = rule.is_batch_aware and rows > 1
        return self.groups and may_share and is_small(rows, slots, experts)

    def describe(self) -> str:
        """The words of the log."""
        if self.small is self.usual:
            return self.usual.value
        grouped = ", or grouped under batch-aware rules" if self.groups else ""
        return f"{self.usual.value}; in small steps {self.small.value}{grouped}"

    @classmethod
    def at_all_sizes(cls, how: Skipped, *, groups: bool = False) -> Skipping:
        """The same in steps of any size."""
        return cls(how, how, groups)


def is_small(rows: int, slots: int, experts: int) -> bool:
    """Whether vLLM's Triton experts compute each slot of a step by itself."""
    return rows * slots * SHARE <= experts


def small_steps_unsupported_reason(runner: Any, slots: Iterable[int], experts: int) -> str | None:
    """Why small steps of a loaded layer cannot have -1 in skipped slots; None if they can.

    `slots` holds the K of each of the layer's rules. vLLM's own code is asked, since it may change,
    whether it takes the largest small steps slot by slot, and whether its kernel passes over -1.
    """
    if reason := triton_unsupported_reason(runner):
        return reason
    layer = runner.routed_experts
    config = layer.quant_method.moe_kernel.fused_experts.quant_config
    if config.use_int8_w8a16 or config.use_int4_w4a16:
        return "its weights are integers"
    functions = import_module(FUNCTIONS)
    in_host_memory = is_in_host_memory(layer)
    for number in sorted(set(slots)):
        rows = experts // (SHARE * number) if number else 0
        if rows and not takes_slots_alone(functions, rows, number, experts, in_host_memory):
            return "this vLLM groups the slots of small steps" + (
                " where weights are in host memory" if in_host_memory else ""
            )
    if not passes_over(functions):
        return "this vLLM's kernel does not pass over -1"
    return None


def is_in_host_memory(layer: Any) -> bool:
    """Whether vLLM left a layer's weights in host memory (--offload-backend uva)."""
    weights = (getattr(layer, name, None) for name in ("w13_weight", "w2_weight"))
    return any(getattr(weight, "_vllm_is_uva_offloaded", False) for weight in weights)


def takes_slots_alone(
    functions: Any, rows: int, slots: int, experts: int, in_host_memory: bool = False
) -> bool:
    """Whether vLLM gives its kernel the ids of such a step as they stand.

    vLLM 0.33 does not where the weights are in host memory, and is told that they are.
    """
    ids_TK = torch.full((rows, slots), -1, dtype=torch.int32)
    assign = getattr(functions, ASSIGN, None)
    if assign is None:
        return False
    told: dict[str, bool] = {}
    if HOST_RESIDENT in inspect.signature(assign).parameters:
        told[HOST_RESIDENT] = in_host_memory
    try:
        order, ids, _rows = assign(ids_TK, {"BLOCK_SIZE_M": 16}, rows, slots, experts, None, **told)
    except Exception:  # it groups them, for which it wants a GPU, or is called in another way
        return False
    return order is None and bool(torch.equal(ids, ids_TK.view(-1)))


def passes_over(functions: Any) -> bool:
    """Whether vLLM's kernel has the branch that writes zeros for -1 and ends."""
    kernel = functions.fused_moe_kernel
    _, branch, after = inspect.getsource(getattr(kernel, "fn", kernel)).partition(BRANCH)
    ends = after.partition("return")[0]
    return bool(branch) and "write_zeros_to_output(" in ends and "tl.load" not in ends


class SlotAssignment:
    """Stands in the place of `_prepare_expert_assignment`, by which vLLM lays out a step's slots.

    It does what vLLM's does, except while a layer asks for its step to be grouped.
    """

    def __init__(self, stock: Callable[..., Any], group: Callable[..., Any]) -> None:
        self._stock = self.__wrapped__ = stock
        self._group = group
        self.is_grouping = False
        """Set by `LayerSteps` for as long as one layer's experts run."""

    @classmethod
    def put(cls) -> SlotAssignment:
        """Lets vLLM's Triton experts call it from now on; again, it gives the one that is there."""
        module = import_module(MODULE)
        stock = getattr(module, ASSIGN)
        if isinstance(stock, cls):
            return stock
        group = alignment()
        assert group is not None  # `grouping_unsupported_reason` asked
        assignment = cls(stock, group)
        setattr(module, ASSIGN, assignment)
        return assignment

    def __call__(
        self,
        topk_ids: Tensor,
        config: dict[str, Any],
        num_tokens: int,
        top_k_num: int,
        global_num_experts: int,
        expert_map: Tensor | None,
        **others: Any,
    ) -> Any:
        """The order of a step's slots, their experts, and how many rows they take with padding."""
        if self.is_grouping and expert_map is None:
            return self._group(topk_ids, config["BLOCK_SIZE_M"], global_num_experts, None)
        step = (topk_ids, config, num_tokens, top_k_num, global_num_experts, expert_map)
        return self._stock(*step, **others)


class LayerSteps:
    """Stands in the place of one layer's `TritonExperts.apply`.

    It has some steps grouped, and tells the layer's activation and sum the ids of the step that
    runs.
    """

    def __init__(
        self,
        runner: Any,
        groups_step: Callable[[int], bool] | None = None,
        skips_step: Callable[[int], bool] | None = None,
    ) -> None:
        """Both functions are asked of a step with so many rows; None: of no step.

        `groups_step` says whether its slots are grouped by expert, `skips_step` whether some of
        its slots may have id -1 and no row.
        """
        self._layer = runner.routed_experts
        self._experts = self._layer.quant_method.moe_kernel.fused_experts
        self._stock = self._experts.apply
        self._groups_step, self._skips_step = groups_step, skips_step
        self.activates_all = False
        """Whether vLLM's activation computes the rows of skipped slots, too."""
        self._assignment = None if groups_step is None else SlotAssignment.put()
        self._sum = None if skips_step is None else SkippingSum(self._experts.moe_sum)

    def put(self) -> None:
        """Lets vLLM call it from now on; a layer that has one already keeps it."""
        if isinstance(self._stock, LayerSteps):
            return
        self._experts.apply = self
        if self._sum is not None:
            activation = SkippingActivation(self._layer, self._sum)
            self._experts.activation, self.activates_all = activation, not activation.leaves_out
            self._experts.moe_sum = self._sum

    def is_in_place(self) -> bool:
        """Whether vLLM still calls it: weights that are loaded anew may come with new experts."""
        return self._layer.quant_method.moe_kernel.fused_experts.apply is self

    def __call__(
        self,
        *arguments: Any,
        topk_ids: Tensor,
        expert_map: Tensor | None = None,
        **others: Any,
    ) -> Any:
        rows = topk_ids.shape[0]
        if self._assignment is not None and self._groups_step is not None:
            self._assignment.is_grouping = self._groups_step(rows)
        if self._sum is not None and self._skips_step is not None and self._skips_step(rows):
            self._sum.step = (topk_ids, expert_map)
        try:
            return self._stock(*arguments, topk_ids=topk_ids, expert_map=expert_map, **others)
        finally:
            if self._assignment is not None:
                self._assignment.is_grouping = False
            if self._sum is not None:
                self._sum.step = None


def grouping_unsupported_reason() -> str | None:
    """Why small steps cannot be grouped in this vLLM; None if they can."""
    if alignment() is None:
        return f"this vLLM's Triton experts have no {ASSIGN} or {ALIGN}"
    return None
