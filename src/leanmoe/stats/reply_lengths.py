"""Whether replies grow, and what is left of a gain per token by the time a request is finished.

Requests finished a second are tokens a second over tokens a request. So the gain per finished
request is the ratio of throughputs over the ratio of mean reply lengths. Lengths are paired by
prompt: what varies is the difference alone. Only prompts whose replies end by themselves under both
models have a length; how many do not is counted beside.

Letters: U prompts, Z batch draws.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from leanmoe.core.errors import LeanMoeError
from leanmoe.core.intervals import PairedRatio, RatioOfRuns, ReplyLengths
from leanmoe.stats.paired import CONFIDENCE, fewest_documents, ratio_of_sums

Lengths = Sequence[int | None]
"""Tokens of each reply with its end token; None for a reply that did not end by itself."""


def finished_length(reply: Sequence[int], ends: frozenset[int]) -> int | None:
    """Tokens of a reply up to its first end token, with it; None where it has none."""
    return next((n for n, token in enumerate(reply, start=1) if token in ends), None)


def compare_lengths(
    full: Lengths,
    plan: Sequence[Lengths],
    most: int,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> ReplyLengths:
    """Mean length under the plan over the full model's, by prompt; `plan` may be several draws.

    The ratio of sums over the prompts that end under the full model and in every draw, with the
    interval of `ratio_of_sums` (linearised variance and bootstrap-t, the wider). No reply has less
    than 1 token or more than `most`, so neither has the ratio. There is none where fewer prompts
    end than an interval needs. Raises LeanMoeError unless there is a length for each prompt.
    """
    if not plan or any(len(draw) != len(full) for draw in plan):
        raise LeanMoeError(f"lengths of {len(full)} replies cannot be paired: give one a prompt")
    both = [
        (before, [draw[n] or 0 for draw in plan])
        for n, before in enumerate(full)
        if before is not None and all(draw[n] is not None for draw in plan)
    ]
    ratio = None
    if len(both) >= fewest_documents(confidence):
        full_U = np.array([before for before, _ in both], dtype=np.float64)
        plan_ZU = np.array([after for _, after in both], dtype=np.float64).T
        found = ratio_of_sums(plan_ZU - full_U, full_U, confidence, seed)
        low, high = (min(max(1 + end, 1 / most), most) for end in (found.low, found.high))
        ratio = PairedRatio(1 + found.ratio, low, high)
    return ReplyLengths(
        prompts=len(full),
        most=most,
        full_ended=sum(length is not None for length in full),
        plan_ended=sum(length is not None for length in plan[0]),
        both_ended=len(both),
        ratio=ratio,
    )


def per_finished_request(gain: RatioOfRuns, lengths: PairedRatio) -> PairedRatio:
    """The gain over the ratio of lengths, from runs and replies that are independent.

    The interval recovers each variance from its own interval, each side by itself, on logarithms
    (MOVER: Zou and Donner, Statistics in Medicine 27, 2008, section 2).
    """

    def apart(first: float, second: float) -> float:
        return math.log(first / second)

    below = math.hypot(apart(gain.median, gain.low), apart(lengths.high, lengths.ratio))
    above = math.hypot(apart(gain.high, gain.median), apart(lengths.ratio, lengths.low))
    ratio = gain.median / lengths.ratio
    return PairedRatio(ratio, ratio * math.exp(-below), ratio * math.exp(above))
