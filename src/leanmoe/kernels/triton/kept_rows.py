"""silu(gate) * up of the rows that have an expert; the rows of skipped slots are left unread.

vLLM's Triton experts activate all slots of a step, skipped ones too, though nothing reads these.

Letters: T tokens (rows of a step), K slots of a token, X all slots, M expert width, E experts.
"""

# mypy: ignore-errors
# Triton's language is not Python's: names are constexprs, tensors or pointers as they are used.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from leanmoe.kernels.triton.state import power_of_two


@triton.jit
def _silu_of_kept(
    # pointers
    gate_up_ptr, act_ptr, ids_ptr, local_ptr,
    # sizes
    width,
    # compile-time
    HAS_LOCAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    x = tl.program_id(0).to(tl.int64)
    expert = tl.load(ids_ptr + x)
    if HAS_LOCAL:
        local = tl.load(local_ptr + tl.maximum(expert, 0)).to(expert.dtype)
        expert = tl.where(expert < 0, expert, local)
    if expert >= 0:
        m = tl.arange(0, BLOCK)
        is_column = m < width
        gate_ptr = gate_up_ptr + x * 2 * width
        gate = tl.load(gate_ptr + m, mask=is_column, other=0.0).to(tl.float32)
        up = tl.load(gate_ptr + width + m, mask=is_column, other=0.0).to(tl.float32)
        # vLLM's operator rounds between its two steps.
        silu = (gate / (1.0 + tl.exp(-gate))).to(act_ptr.dtype.element_ty).to(tl.float32)
        tl.store(act_ptr + x * width + m, (silu * up).to(act_ptr.dtype.element_ty), mask=is_column)


def silu_of_kept(
    gate_up_XM: Tensor, act_XM: Tensor, ids_TK: Tensor, local_of_E: Tensor | None
) -> None:
    """Writes silu(gate) * up to `act_XM` (X, M) for slots with an expert here; others stay.

    `gate_up_XM` (X, 2M) has each slot's gate before its up, `ids_TK` each slot's expert, below 0
    for none. `local_of_E` says where on this GPU an expert is, below 0 for elsewhere.
    """
    rows, width = act_XM.shape
    local_E = ids_TK if local_of_E is None else local_of_E
    with torch.inference_mode():
        _silu_of_kept[(rows,)](
            gate_up_XM, act_XM, ids_TK, local_E, width,
            HAS_LOCAL=local_of_E is not None, BLOCK=power_of_two(width), num_warps=4,
        )  # fmt: skip
