"""Expert blocks: which rows each active expert computes, in blocks, all on the device.

vLLM calls the same step `moe_align_block_size`.

Letters: T tokens, K slots a token, E experts, X the T*K slots in the order of their experts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from leanmoe.kernels.triton.state import power_of_two, zeros_for

MOST_IN_ONE = 2048
"""So many slots are grouped by one program, in one launch."""
CHUNK = 512
"""Slots a program groups where there are more."""


class ExpertBlocks(NamedTuple):
    """Slots grouped by expert and cut into blocks; skipped slots and unused experts are in none.

    Its sizes depend on T, K, E and `block_rows` alone, so that a captured graph can be replayed.
    """

    rows: Tensor
    """int32: slot numbers t*K + k; those of one expert lie together, in any order."""
    table: Tensor
    """int32, (3, most blocks): each block's expert, its first place in `rows`, its number of rows.
    Blocks of one expert follow each other; all but its last are full."""
    used_1: Tensor
    """int32: how many blocks there are; what lies in `table` beyond them is undefined."""
    block_rows: int
    """Rows in a full block."""


def most_blocks(slots: int, experts: int, block_rows: int) -> int:
    """The most blocks that this many slots can make, however they are spread."""
    return min(slots, slots // block_rows + min(experts, slots))


def expert_blocks_reference(ids_TK: Tensor, experts: int, block_rows: int) -> ExpertBlocks:
    """The expert blocks in plain torch, rows of an expert in order; waits for the device."""
    flat_X = ids_TK.reshape(-1)
    order_X = flat_X.sort(stable=True)[1]
    counts: list[int] = torch.bincount(flat_X, minlength=experts + 1)[:experts].tolist()
    entries: list[tuple[int, int, int]] = []
    start = 0
    for expert, count in enumerate(counts):
        for first in range(0, count, block_rows):
            entries.append((expert, start + first, min(block_rows, count - first)))
        start += count
    table = torch.zeros(3, most_blocks(flat_X.numel(), experts, block_rows), dtype=torch.int32)
    if entries:
        table[:, : len(entries)] = torch.tensor(entries, dtype=torch.int32).T
    device = ids_TK.device
    used_1 = torch.tensor([len(entries)], dtype=torch.int32, device=device)
    return ExpertBlocks(order_X.to(torch.int32), table.to(device), used_1, block_rows)


def build_expert_blocks(ids_TK: Tensor, experts: int, block_rows: int) -> ExpertBlocks:
    """The expert blocks of any ids (T,K), E for a skipped slot. Waits for nothing."""
    rows, table, used_1 = _expert_blocks_op(ids_TK.contiguous(), experts, block_rows)
    return ExpertBlocks(rows, table, used_1, block_rows)


@torch.library.custom_op("leanmoe::expert_blocks", mutates_args=())
def _expert_blocks_op(
    ids_TK: Tensor, experts: int, block_rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    from leanmoe.kernels.triton.expert_blocks_program import group_slots, scatter_slots

    slots, (rows, table, used_1) = ids_TK.numel(), _empty(ids_TK, experts, block_rows)
    if not slots:
        return rows, table, used_1.zero_()
    is_one = slots <= MOST_IN_ONE
    chunk = max(32, power_of_two(slots)) if is_one else CHUNK
    programs = 1 if is_one else -(-slots // chunk)
    counts = zeros_for("expert blocks", experts + 1, ids_TK.device)
    places, starts = torch.empty_like(rows), rows.new_empty(experts)
    group_slots[(programs,)](
        ids_TK, counts, places, starts, rows, table, used_1, slots, table.shape[1],
        E=experts, PADDED_E=power_of_two(experts), BLOCK_ROWS=block_rows, CHUNK=chunk,
        IS_ONE=is_one,
        num_warps=8 if chunk > CHUNK else 4,
    )  # fmt: skip
    if not is_one:
        scatter_slots[(programs,)](ids_TK, places, starts, rows, slots, E=experts, CHUNK=chunk)
    return rows, table, used_1


@_expert_blocks_op.register_fake
def _expert_blocks_fake(
    ids_TK: Tensor, experts: int, block_rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(ids_TK, experts, block_rows)


def _empty(ids_TK: Tensor, experts: int, block_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    slots = ids_TK.numel()
    blocks = most_blocks(slots, experts, block_rows)
    return (
        ids_TK.new_empty(slots, dtype=torch.int32),
        ids_TK.new_empty(3, blocks, dtype=torch.int32),
        ids_TK.new_empty(1, dtype=torch.int32),
    )
