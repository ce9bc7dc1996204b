"""Variants compared in interleaved runs of one load.

A machine grows warm and slow over minutes: runs of one variant after the other would call that a
gain. So each repeat runs every variant once, in a new order, on prompts of its own that all of them
get, and ratios are of runs of the same repeat. Repeats go on until the gain is known as closely as
was asked (`leanmoe.stats.runs.Looks`).
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Mapping

BUSY_SHARE = 0.15
"""Of the cores, in use by others for half a second, from which on a machine is called busy."""


def interleaved(
    repeats: Mapping[str, int],
    rng: random.Random,
    are_enough: Callable[[int], bool] = lambda _repeats: False,
) -> Iterator[tuple[int, str]]:
    """Each repeat's number and a variant's name: all that take part in the repeat, shuffled.

    `repeats` holds how many each variant takes part in at most, the first ones; after each repeat
    `are_enough` is asked whether there have been enough.
    """
    for repeat in range(max(repeats.values(), default=0)):
        taking_part = [name for name, count in repeats.items() if repeat < count]
        for name in rng.sample(taking_part, len(taking_part)):
            yield repeat, name
        if are_enough(repeat + 1):
            return


def busy_machine(when: str) -> str | None:
    """What other work takes of this machine's cores at a moment when we take nothing."""
    import psutil

    cores = os.cpu_count() or 1
    share = psutil.cpu_percent(interval=0.5) / 100
    if share < BUSY_SHARE:
        return None
    return (
        f"Other work took {share * cores:.1f} of this machine's {cores} cores {when}: "
        "times are longer, and intervals wider or of more repeats"
    )
