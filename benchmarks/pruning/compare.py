"""Which of two settings loses less? Differences paired by document. Part of `measure`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.pruning.speed import STEPS, Pair, Timed
from leanmoe.stats.losses import Losses
from leanmoe.stats.paired import Estimate, loss_difference

RIVALS = ("random", "activate-count")
BY_OUTPUT = ("reap", "easy-ep", "output-sum", "output-error")
AS_FAST = 0.97
"""Skipping counts as as fast as pruning from here on: surely no more than 3% slower."""


def against(full: Losses, lost: dict[Pair, Losses]) -> list[dict[str, Any]]:
    """The criteria that look at outputs against those that do not."""
    pairs = [
        (name, rival, keep) for name in BY_OUTPUT for rival in RIVALS for keep in ("75%", "50%")
    ]
    return [
        {
            "criterion": name,
            "rival": rival,
            "keep": keep,
            "difference": loss_difference(full, lost[name, keep], lost[rival, keep]).to_json(),
        }
        for name, rival, keep in pairs
        if (name, keep) in lost and (rival, keep) in lost
    ]


def ordering(
    full: Losses, lost: dict[Pair, Losses], timed: Timed, shares: Sequence[str]
) -> list[dict[str, Any]]:
    """At each load: does skipping lose less than pruning does, where it is as fast or faster?

    Beside each pruned checkpoint (of the criterion that loses least there, which favours pruning)
    stands the skipping of least loss that is surely no more than 3% slower, with weights normalised
    anew as in the paper, and kept as in leanmoe.
    """
    rows = []
    for load in STEPS:
        for keep in shares:
            pruned = min(
                (pair for pair in timed.seconds if pair[1] == keep),
                key=lambda pair: lost[pair].mean,
            )
            for weights, marked in (("normalised anew", False), ("weights kept", True)):
                row: dict[str, Any] = {
                    "load": load,
                    "keep": keep,
                    "criterion": pruned[0],
                    "skipping": weights,
                }
                fast = [
                    pair
                    for pair in lost
                    if pair[1] == "100%"
                    and ("kept" in pair[0]) == marked
                    and timed.ratio(pruned, pair, load).low >= AS_FAST
                ]
                if not fast:
                    rows.append({**row, "verdict": "no skipping is surely as fast"})
                    continue
                best = min(fast, key=lambda pair: lost[pair].mean)
                found = loss_difference(full, lost[best], lost[pruned])
                rows.append(
                    {
                        **row,
                        "setting": best[0],
                        "speed": asdict(timed.ratio(pruned, best, load)),
                        "difference": found.to_json(),
                        "verdict": _verdict(found),
                    }
                )
    return rows


def _verdict(found: Estimate) -> str:
    if found.high < 0:
        return "skipping loses less"
    return "pruning loses less" if found.low > 0 else "undecided"
