"""build_expert_blocks against the reference: the same rows in the same blocks, in any order."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from leanmoe.kernels.triton import expert_blocks
from leanmoe.kernels.triton.expert_blocks import (
    ExpertBlocks,
    build_expert_blocks,
    expert_blocks_reference,
    most_blocks,
)

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def by_block(blocks: ExpertBlocks) -> list[tuple[int, int]]:
    """Expert and number of rows of each block, in order."""
    used = int(blocks.used_1)
    experts, _, counts = (line[:used].tolist() for line in blocks.table.cpu())
    return list(zip(experts, counts, strict=True))


def by_expert(blocks: ExpertBlocks) -> dict[int, list[int]]:
    """The slots of each expert, sorted."""
    found: dict[int, list[int]] = {}
    rows = blocks.rows.cpu()
    for expert, first, count in blocks.table.cpu()[:, : int(blocks.used_1)].T.tolist():
        found.setdefault(expert, []).extend(rows[first : first + count].tolist())
    return {expert: sorted(slots) for expert, slots in found.items()}


def check(ids: Tensor, experts: int, block_rows: int) -> None:
    found = build_expert_blocks(ids.to(DEVICE), experts, block_rows)
    wanted = expert_blocks_reference(ids, experts, block_rows)
    assert by_block(found) == by_block(wanted)
    assert by_expert(found) == by_expert(wanted)
    assert found.table.shape == wanted.table.shape


@given(
    st.integers(1, 40),
    st.integers(1, 5),
    st.integers(1, 70),
    st.sampled_from((16, 48)),
    st.sampled_from((0.0, 0.5, 1.0)),
    st.integers(0, 99),
)
@settings(deadline=None, max_examples=25)
def test_any_ids(
    tokens: int, slots: int, experts: int, block_rows: int, skipped: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(experts, (tokens, slots), generator=generator)
    ids[torch.rand(tokens, slots, generator=generator) < skipped] = experts
    check(ids, experts, block_rows)


def test_many_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_blocks, "MOST_IN_ONE", 32)
    monkeypatch.setattr(expert_blocks, "CHUNK", 64)
    check(torch.randint(13, (100, 3)), 12, 16)


def test_all_slots_on_one_expert() -> None:
    check(torch.full((50, 2), 3), 512, 16)


def test_no_slots() -> None:
    assert (
        int(build_expert_blocks(torch.empty(0, 4, dtype=torch.int64).to(DEVICE), 8, 16).used_1) == 0
    )


@pytest.mark.parametrize(
    ("slots", "experts", "rows"), [(1, 256, 16), (256, 256, 16), (9000, 8, 64)]
)
def test_there_is_room_for_the_worst_spread(slots: int, experts: int, rows: int) -> None:
    """As many experts as can be have one row more than fills their blocks."""
    counts = [0] * experts
    left, expert = slots, 0
    while left:
        take = min(left, 1 if counts[expert % experts] == 0 else rows)
        counts[expert % experts] += take
        left, expert = left - take, expert + 1
    assert sum(-(-c // rows) for c in counts) <= most_blocks(slots, experts, rows)
