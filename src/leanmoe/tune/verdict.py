"""What is claimed at each load: only what both the loss and the throughput bear out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from leanmoe.tune.validate import Proved


def verdict_on(
    load: int,
    up_to: int | None,
    points: Sequence[Proved],
    chosen: Proved | None,
    gain: Mapping[str, Any],
) -> dict[str, Any]:
    """Accepted if a plan's loss is within the margin and its throughput surely above full's."""
    ratio = gain["ratio"]
    verdict: dict[str, Any] = {
        "concurrency": load,
        "up_to": up_to,
        "accepted": False,
        "loss": None,
        "gain": None,
    }
    if chosen is None:
        last = points[0].verdict.reason if points else "no plan was predicted to be within it"
        return {**verdict, "reason": f"no plan is within the margin: {last}"}
    verdict |= {"loss": chosen.verdict.loss.to_json(), "gain": ratio}
    if ratio["low"] <= 1.0:
        reason = (
            f"throughput is not surely higher ({ratio['low']:.3f} to {ratio['high']:.3f} times): "
            "the full model stays"
        )
        return {**verdict, "reason": reason}
    stopped = points[-1].verdict
    reason = (
        "the fastest plan tried is within the margin"
        if stopped.accepted
        else "the next faster plan is not within the margin"
    )
    return {**verdict, "accepted": True, "reason": reason}
