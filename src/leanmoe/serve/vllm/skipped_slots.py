"""Experts that compute nothing for skipped slots in steps of any size: vLLM's own, or leanmoe's.

vLLM's Triton experts lay the slots of a step out in blocks of one expert each
(`moe_align_block_size`), multiply the blocks, and add up the K rows of each token (`moe_sum`).
Since vLLM 0.26 the first leaves out ids below 0, and the second can be told the ids and leaves the
same slots out; without expert parallelism vLLM does not tell it (`TritonExperts.moe_sum`, read in
0.26.0 and 0.33.0). A skipped slot then has no row: nothing writes one, and `SkippingSum` sees that
nothing adds one up. `SkippingActivation` spares the step between them the rows that nobody wrote:
vLLM's time there is in proportion to all slots. Each row is computed from itself alone, but for one
case that is left out: fp8 activations with one scale for all rows.

None of this is promised. So both operators run once when a layer is loaded, on its device, with NaN
where a skipped row would be. In vLLM 0.24 the alignment counted an id of -1 outside of its memory:
it is asked only where `moe_sum` takes ids, which is newer than the alignment's change.

Else leanmoe's own kernels can take the place of vLLM's Triton experts: LEANMOE_EXPERTS=leanmoe.

Letters: T tokens (rows of a step), E experts, K slots of a token, D hidden width, X all slots.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from functools import cached_property
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from leanmoe.core.errors import LeanMoeError
from leanmoe.kernels import Choice, Experts, ExpertWeights, Gate, choose_experts, experts_gpu
from leanmoe.kernels.triton.experts import silu_of_kept
from leanmoe.serve.vllm.checks import (
    GATHERING,
    TRITON,
    not_triton_reason,
    triton_unsupported_reason,
)

OPERATORS = "vllm._custom_ops"
ASSIGN, ALIGN = "_prepare_expert_assignment", "moe_align_block_size"
"""Functions of vLLM: the second is in the module that defines the first."""
MODULE, _ = TRITON
"""The module in which vLLM's Triton experts look up the first of the two."""
ROWS = (1, 5, 40, 700)
"""Rows of the steps that are tried: alignment has kernels of its own for few slots."""
BLOCKS = (16, 64)
"""Rows of a block (BLOCK_SIZE_M) that are tried."""
WIDTH = 256
"""Hidden width of the rows that are summed."""


def all_sizes_unsupported_reason(runner: Any, slots: Iterable[int], experts: int) -> str | None:
    """Why a loaded layer's skipped slots cannot be -1 in steps of any size; None if they can.

    `slots` holds the K of each of the layer's rules, `experts` is the model's E.
    """
    if reason := not_triton_reason(runner) or _layer_reason(runner):
        return reason
    moe_sum = import_module(OPERATORS).moe_sum
    if "topk_ids" not in inspect.signature(moe_sum).parameters:
        return "this vLLM's moe_sum adds up all slots (0.26 and newer can leave some out)"
    align = alignment()
    if align is None:
        return f"this vLLM's Triton experts have no {ASSIGN} or {ALIGN}"
    layer = runner.routed_experts
    where, local_of_E = layer.w13_weight.device, layer.expert_map
    total = experts if local_of_E is None else local_of_E.shape[0]
    for number in sorted({number for number in slots if number}):
        for rows in ROWS:
            ids_TK = drawn_ids(rows, number, total).to(where)
            try:
                dropped = drops(align, ids_TK, total, local_of_E)
                left_out = leaves_out(moe_sum, ids_TK, local_of_E)
            except Exception as error:  # an operator that is called in another way
                return f"this vLLM's operators fail on id -1 ({type(error).__name__})"
            if not dropped:
                return f"this vLLM's alignment does not drop -1 from {rows} rows"
            if not left_out:
                return f"this vLLM's moe_sum does not leave -1 out of {rows} rows"
    return None


def _layer_reason(runner: Any) -> str | None:
    config = runner.routed_experts.quant_method.moe_kernel.fused_experts.quant_config
    if config.use_int8_w8a16 or config.use_int4_w4a16:
        return "its weights are integers"
    has_scale = config.a2_scale is not None or config.block_shape is not None
    if config.quant_dtype is not None and not has_scale and not config.per_act_token_quant:
        return "its activations share one scale, which rows that nobody wrote would change"
    parallel = runner.moe_config
    if parallel.pcp_size > 1:
        return "its tokens are divided by prefill context parallelism"
    backend = parallel.moe_parallel_config.all2all_backend
    if (parallel.dp_size > 1 or parallel.is_sequence_parallel) and backend not in GATHERING:
        return f"its tokens are exchanged by {backend}"
    return None


def alignment() -> Callable[..., Any] | None:
    """vLLM's `moe_align_block_size`, as its Triton experts find it; None where they do not."""
    assign = getattr(import_module(MODULE), ASSIGN, None)
    if assign is None:
        return None
    stock = inspect.unwrap(assign)
    found: Callable[..., Any] | None = getattr(import_module(stock.__module__), ALIGN, None)
    return found


def drawn_ids(rows: int, slots: int, experts: int) -> Tensor:
    """Ids (T,K), int32, of distinct experts, two in five of them -1; the first of several rows has
    none but -1."""
    generator = torch.Generator().manual_seed(rows * 1000 + slots)
    scores_TE = torch.rand(rows, experts, generator=generator)
    ids_TK = scores_TE.topk(min(slots, experts)).indices.int()
    ids_TK[torch.rand(ids_TK.shape, generator=generator) < 0.4] = -1
    if rows > 1:
        ids_TK[0] = -1
    return ids_TK


def drops(
    align: Callable[..., Any], ids_TK: Tensor, experts: int, local_of_E: Tensor | None
) -> bool:
    """Whether alignment puts each slot into a block of its own expert, and -1 into none.

    With expert parallelism `local_of_E` says where on this GPU an expert is, -1 for elsewhere; a
    slot of an expert elsewhere may be left out, too, or stand in a block that is passed over.
    """
    wanted_X = _local_ids(ids_TK, local_of_E).view(-1)
    ways: list[dict[str, bool]] = [{}]
    if local_of_E is not None and "ignore_invalid_experts" in inspect.signature(align).parameters:
        ways.append({"ignore_invalid_experts": True})
    for block in BLOCKS:
        for way in ways:
            order, experts_of_blocks, rows = align(ids_TK, block, experts, local_of_E, **way)
            listed = order[: int(rows)].long()
            of_listed = experts_of_blocks.repeat_interleave(block)[: int(rows)].to(wanted_X.dtype)
            is_slot = (listed >= 0) & (listed < ids_TK.numel())
            placed_X = torch.full_like(wanted_X, -1)
            placed_X[listed[is_slot]] = of_listed[is_slot]
            if not torch.equal(placed_X, wanted_X):
                return False
    return True


def leaves_out(moe_sum: Callable[..., None], ids_TK: Tensor, local_of_E: Tensor | None) -> bool:
    """Whether the sum has nothing of slots whose id is -1, or whose expert is elsewhere.

    Their rows are NaN. The others are whole numbers that bfloat16 adds up exactly.
    """
    generator = torch.Generator().manual_seed(ids_TK.shape[0])
    rows_TKD = torch.randint(-2, 3, (*ids_TK.shape, WIDTH), generator=generator)
    rows_TKD = rows_TKD.to(ids_TK.device, torch.bfloat16)
    is_left_out_TK = _local_ids(ids_TK, local_of_E) < 0
    wanted_TD = rows_TKD.masked_fill(is_left_out_TK[..., None], 0).sum(1)
    output_TD = torch.full_like(wanted_TD, float("nan"))
    moe_sum(rows_TKD.masked_fill(is_left_out_TK[..., None], float("nan")), output_TD, ids_TK,
            local_of_E)  # fmt: skip
    return bool(torch.equal(output_TD, wanted_TD))


def _local_ids(ids_TK: Tensor, local_of_E: Tensor | None) -> Tensor:
    """Each slot's expert as this GPU numbers them; -1 for none, and for one that is elsewhere."""
    if local_of_E is None:
        return ids_TK
    local_TK = local_of_E.to(ids_TK.dtype)[ids_TK.clamp_min(0).long()]
    return torch.where(ids_TK < 0, -1, local_TK)


class SkippingSum:
    """Stands in the place of one layer's `TritonExperts.moe_sum`; its operator is told the ids."""

    def __init__(self, stock: Callable[..., None]) -> None:
        self._stock = stock
        self.step: tuple[Tensor, Tensor | None] | None = None
        """The ids (T,K) of the step that runs and where experts are (E), if slots of it may have no
        row. vLLM 0.26 to 0.30 hand neither to `moe_sum`."""

    @cached_property
    def _operator(self) -> Callable[..., None]:
        operator: Callable[..., None] = import_module(OPERATORS).moe_sum
        return operator

    def __call__(self, input: Tensor, output: Tensor, *ids: Any, **named: Any) -> None:
        """Adds up the rows (T,K,D) of each token's own slots to `output` (T,D)."""
        if self.step is None:
            self._stock(input, output, *ids, **named)
        else:
            self._operator(input, output, *self.step)


class SkippingActivation:
    """Stands in the place of one layer's `TritonExperts.activation`, which takes no ids.

    Where both give the same, rows that nobody wrote are left out; else it is vLLM's as it was.
    """

    def __init__(self, layer: Any, sums: SkippingSum) -> None:
        """`layer` is vLLM's `routed_experts`; its activation is tried on a few rows of large
        values, so that limits, slopes and kinds of activation show."""
        self._stock = layer.quant_method.moe_kernel.fused_experts.activation
        self._sums = sums
        self.leaves_out = layer.w13_weight.is_cuda and self._is_silu(layer)

    def _is_silu(self, layer: Any) -> bool:
        generator = torch.Generator().manual_seed(0)
        rows_XM = torch.randn(8, WIDTH, generator=generator).mul(8)
        rows_XM = rows_XM.to(layer.w13_weight.device, torch.bfloat16)
        theirs, ours = (rows_XM.new_full((8, WIDTH // 2), float("nan")) for _ in range(2))
        try:
            self._stock(layer.activation, theirs, rows_XM)
        except Exception:  # another number of columns, or called in another way
            return False
        ids_TK = torch.zeros(8, 1, dtype=torch.int32, device=rows_XM.device)
        silu_of_kept(rows_XM, ours, ids_TK, None)
        return torch.allclose(theirs, ours, rtol=2**-6, atol=1e-5)

    def __call__(self, activation: Any, output: Tensor, input: Tensor, **named: Any) -> None:
        """Writes the activated rows (X, M) of `input` (X, 2M) to `output`."""
        if self._sums.step is None or not self.leaves_out:
            self._stock(activation, output, input, **named)
        else:
            silu_of_kept(input, output, *self._sums.step)


GATES = {
    "silu": Gate(),
    "gelu": Gate("gelu"),
    "gelu_tanh": Gate("gelu_tanh"),
    "swigluoai": Gate.gpt_oss(),
}
"""vLLM's names of the activations that leanmoe's kernels have."""
INTERLEAVED = ("swigluoai",)
"""The activations whose first product has gate and up columns in turn."""


def check_experts(runner: Any, name: str) -> None:
    """Refuses a loaded layer that leanmoe's kernels cannot compute."""
    if reason := kernels_unsupported_reason(runner):
        raise LeanMoeError(
            f"{name}: LEANMOE_EXPERTS=leanmoe cannot compute it: {reason}; unset LEANMOE_EXPERTS"
        )


def kernels_unsupported_reason(runner: Any) -> str | None:
    """Why leanmoe's kernels cannot compute a loaded layer; None if they can."""
    if reason := triton_unsupported_reason(runner):
        return f"{reason}, not TritonExperts alone on one GPU (--moe-backend triton)"
    layer = runner.routed_experts
    config = layer.quant_method.moe_kernel.fused_experts.quant_config
    if config.quant_dtype is not None or config.w1_scale is not None:
        return f"its weights are quantised by {type(layer.quant_method).__name__}"
    activation = str(layer.activation.value)
    if activation not in GATES:
        return f"its activation is {activation}"
    if activation not in INTERLEAVED and config.gemm1_clamp_limit is not None:
        return f"its {activation} is clamped"
    if layer.apply_router_weight_on_input:
        return "its routing weights go to the input"
    choice = kernels_for(layer)
    return None if choice.name == "gpu" else choice.reason


def kernels_for(layer: Any) -> Choice[Experts]:
    """What computes a loaded layer's experts on a GPU in leanmoe, and why it is that."""
    return choose_experts(weights_of(layer), "cuda")


def weights_of(layer: Any) -> ExpertWeights:
    """A loaded layer's weights, where they lie."""
    config = layer.quant_method.moe_kernel.fused_experts.quant_config
    activation = str(layer.activation.value)
    return ExpertWeights(
        gate_up=layer.w13_weight.data,
        down=layer.w2_weight.data,
        gate_up_bias=config.w1_bias,
        down_bias=config.w2_bias,
        is_concatenated=activation not in INTERLEAVED,
        gate=GATES[activation],
    )


def warm_up(layer: Any, rows: int, slots: int) -> None:
    """Compiles what a loaded layer's step of so many rows and slots launches."""
    weights = weights_of(layer)
    experts, hidden = weights.down.shape[0], layer.w2_weight.shape[1]
    hidden_TD = weights.down.new_zeros(rows, hidden)
    ids_TK = torch.arange(rows * slots, device=hidden_TD.device).remainder(experts)
    gates_TK = torch.ones(rows, slots, device=hidden_TD.device)
    experts_gpu(hidden_TD, ids_TK.view(rows, slots).int(), gates_TK, weights)


class LeanmoeExperts:
    """Stands in the place of `TritonExperts.apply`: a skipped slot costs it nothing at any size of
    a step. What it cannot compute is refused."""

    def __init__(self, runner: Any) -> None:
        self._layer = runner.routed_experts
        self.stock = self._layer.quant_method.moe_kernel.fused_experts.apply

    def __call__(
        self,
        *,
        output: Tensor,
        hidden_states: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        **_others: Any,
    ) -> None:
        """Writes each row's weighted sum (T,D) to `output`."""
        experts_gpu(hidden_states, topk_ids, topk_weights, weights_of(self._layer), out=output)

    def put(self) -> None:
        """Lets vLLM call it from now on."""
        self._layer.quant_method.moe_kernel.fused_experts.apply = self

    def is_in_place(self) -> bool:
        """Whether vLLM still calls it: weights that are loaded anew may come with new experts."""
        return self._layer.quant_method.moe_kernel.fused_experts.apply is self
