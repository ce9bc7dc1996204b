"""Every step of every kernel falls into one of its stages."""

from __future__ import annotations

import pytest

from leanmoe.predict.kernels.tile_heuristics import (
    ANY,
    CUTLASS,
    SCHEDULES,
    TUNED,
    StepRange,
    stages,
)


@pytest.mark.parametrize("schedule", [*SCHEDULES.values(), TUNED, CUTLASS])
def test_stages_rise_and_the_last_takes_any_step(schedule: tuple[StepRange, ...]) -> None:
    limits = {(stage.tokens_an_expert, stage.slots_an_expert) for stage in schedule}
    for limit in limits:
        mine = [s.up_to for s in schedule if (s.tokens_an_expert, s.slots_an_expert) == limit]
        assert mine == sorted(set(mine))
    last = schedule[-1]
    assert (last.up_to, last.tokens_an_expert, last.slots_an_expert) == (ANY, None, None)


def test_stages_share_their_tiles() -> None:
    few, any_step = stages((4, ANY), CUTLASS[0].tiles)
    assert (few.up_to, any_step.up_to) == (4, ANY)
    assert few.tiles == any_step.tiles == CUTLASS[0].tiles
