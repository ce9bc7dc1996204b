"""How sure we are of a change in accuracy: paired statistics over questions. Needs no torch.

Full model and plan answer the same questions, so what varies is the questions that change sides.
Letters: U questions, Z batch draws (runs in which other requests share the batch, by other seeds).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

from leanmoe.core.errors import LeanMoeError
from leanmoe.results.eval import AccuracyChange, TaskVerdict
from leanmoe.stats.paired import CONFIDENCE, POWER

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

ASSUMED_CHANGES = 0.05
"""Share of questions that change sides, assumed before a run; what is seen replaces it after."""


def difference(full_U: Bools, plan_ZU: Bools, confidence: float = CONFIDENCE) -> AccuracyChange:
    """Accuracy of `plan_ZU` less that of `full_U`, question by question.

    One batch draw: Tango's score interval for paired proportions (Statistics in Medicine 17,
    1998), which holds where few or no questions change sides. Several: a question counts with its
    mean over draws, and questions are the units of a t interval that is never narrower than
    Tango's on as many questions that change sides as there are in the mean draw. Raises
    LeanMoeError when there are no questions or numbers of them differ.
    """
    if not len(full_U) or plan_ZU.ndim != 2 or plan_ZU.shape[1] != len(full_U):
        raise LeanMoeError(
            f"{len(full_U)} questions of the full model cannot be paired with "
            f"{plan_ZU.shape} of the plan"
        )
    lost_Z = (full_U & ~plan_ZU).sum(1)
    gained_Z = (~full_U & plan_ZU).sum(1)
    draws_Z = (gained_Z - lost_Z) / len(full_U)
    mean = float(draws_Z.mean())
    gained, lost = float(gained_Z.mean()), float(lost_Z.mean())
    error = 0.0
    if len(plan_ZU) > 1 and len(full_U) > 1:
        change_U = plan_ZU.mean(0) - full_U
        error = float(change_U.std(ddof=1) / math.sqrt(len(full_U)))

    def reach(miss: float, up: bool) -> float:
        tango = tango_bound(gained, lost, len(full_U), miss, up)
        t = float(stats.t.ppf(1 - miss, max(len(full_U) - 1, 1))) * error
        return max(tango, mean + t) if up else min(tango, mean - t)

    miss = 1 - confidence
    changes = (gained + lost) / len(full_U)
    return AccuracyChange(
        items=len(full_U),
        full=float(full_U.mean()),
        plan=float(plan_ZU.mean()),
        difference=mean,
        low=reach(miss / 2, up=False),
        high=reach(miss / 2, up=True),
        lower_bound=reach(miss, up=False),
        lost=int(lost_Z[0]),
        gained=int(gained_Z[0]),
        mcnemar=mcnemar(int(lost_Z[0]), int(gained_Z[0])),
        smallest_seen=smallest_loss(len(full_U), changes, confidence),
        batch_draws=len(plan_ZU),
        lowest_draw=float(draws_Z.min()),
        highest_draw=float(draws_Z.max()),
    )


def mean_of_tasks(found: Sequence[AccuracyChange]) -> AccuracyChange:
    """The mean over tasks, each counting the same whatever its number of questions.

    Its interval adds the tasks' own as independent ones, each side on its own (Newcombe's square
    and add, Statistics in Medicine 17, 1998). Counts are sums; McNemar is of those.
    """
    if not found:
        raise LeanMoeError("there is no task to take a mean of")
    count = len(found)
    mean = sum(d.difference for d in found) / count

    def reach(bound: Callable[[AccuracyChange], float]) -> float:
        return math.sqrt(sum((d.difference - bound(d)) ** 2 for d in found)) / count

    lost, gained = sum(d.lost for d in found), sum(d.gained for d in found)
    return AccuracyChange(
        items=sum(d.items for d in found),
        full=sum(d.full for d in found) / count,
        plan=sum(d.plan for d in found) / count,
        difference=mean,
        low=mean - reach(lambda d: d.low),
        high=mean + reach(lambda d: d.high),
        lower_bound=mean - reach(lambda d: d.lower_bound),
        lost=lost,
        gained=gained,
        mcnemar=mcnemar(lost, gained),
        smallest_seen=math.sqrt(sum(d.smallest_seen**2 for d in found)) / count,
        batch_draws=found[0].batch_draws,
        lowest_draw=sum(d.lowest_draw for d in found) / count,
        highest_draw=sum(d.highest_draw for d in found) / count,
    )


def non_inferior_accuracy(
    at: Callable[[float], AccuracyChange],
    margin: float,
    confidence: float = CONFIDENCE,
    sharing: int = 1,
) -> TaskVerdict:
    """Accepts only if, with `confidence`, accuracy is at most `margin` below the full model's.

    `at` gives the change with a confidence; `sharing` verdicts share the error (`holm`).
    """
    found = at(confidence)
    shown = (
        f"accuracy {100 * found.difference:+.2f} points, at least "
        f"{100 * found.lower_bound:+.2f} with {100 * confidence:g}%"
    )
    bound = found.lower_bound
    if sharing > 1:
        bound = at(1 - (1 - confidence) / sharing).lower_bound
        shown += f", {100 * bound:+.2f} where {sharing} verdicts share the error"
    if bound >= -margin:
        return TaskVerdict(True, margin, f"{shown}: within {100 * margin:g} points", sharing)
    reason = f"{shown}: not shown to be within {100 * margin:g} points"
    if found.difference > -margin:
        reason += f"; {found.items:,} questions like these show {100 * found.smallest_seen:.2f}"
    return TaskVerdict(False, margin, reason, sharing)


def mcnemar(lost: int, gained: int) -> float:
    """Exact two-sided p of McNemar's test: a fair coin for each question that changes sides."""
    if lost + gained == 0:
        return 1.0
    return float(stats.binomtest(lost, lost + gained, 0.5).pvalue)


def tango_bound(gained: float, lost: float, items: int, miss: float, up: bool) -> float:
    """The bound on the difference of paired proportions beyond which the score test rejects.

    T. Tango, Statistics in Medicine 17 (1998), 891-908: the variance is that of the likeliest
    proportions with the difference that is tested.
    """
    wanted = float(stats.norm.ppf(1 - miss))

    def over(value: float) -> float:
        score = _score(gained, lost, items, value)
        return (-score if up else score) - wanted

    estimate = (gained - lost) / items
    edge = 1.0 if up else -1.0
    if over(edge * (1 - 1e-12)) <= 0:
        return edge
    low, high = sorted((estimate, edge * (1 - 1e-12)))
    return float(optimize.brentq(over, low, high, xtol=1e-12))


def _score(gained: float, lost: float, items: int, value: float) -> float:
    """Standard errors between the difference seen and `value`."""
    a = 2 * items
    b = -gained - lost + (2 * items - gained + lost) * value
    c = -lost * value * (1 - value)
    share_lost = (math.sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)
    variance = items * (2 * share_lost + value * (1 - value))
    off = gained - lost - items * value
    if variance <= 0:
        return 0.0 if off == 0 else math.copysign(math.inf, off)
    return off / math.sqrt(variance)


@lru_cache(maxsize=256)
def smallest_loss(
    items: int, changes: float = ASSUMED_CHANGES, confidence: float = CONFIDENCE,
    power: float = POWER,
) -> float:  # fmt: skip
    """The smallest true loss that `items` questions show, one-sided, with probability `power`.

    `changes` is the share of questions that change sides. No less than `least_loss`, since what is
    lost changes sides itself.
    """
    reach = float(stats.norm.ppf(confidence) + stats.norm.ppf(power))
    return min(1.0, max(reach * math.sqrt(changes / items), least_loss(items, confidence, power)))


@lru_cache(maxsize=256)
def least_loss(items: int, confidence: float = CONFIDENCE, power: float = POWER) -> float:
    """The smallest loss that `items` questions could show if no question were ever gained.

    The exact test needs so many losses and no gain that a fair coin would give them rarely; a
    smaller true loss makes so many too seldom, whatever the model.
    """
    needed = math.ceil(math.log(1 - confidence) / math.log(0.5) - 1e-9)
    if needed > items:
        return 1.0

    def short(share: float) -> float:
        return float(stats.binom.sf(needed - 1, items, share)) - power

    return 1.0 if short(1.0) < 0 else float(optimize.brentq(short, 1e-12, 1.0))


def forecast(name: str, items: int, margin: float, confidence: float = CONFIDENCE) -> str:
    """What so many questions can and cannot show, said before they are run."""
    least, likely = least_loss(items, confidence), smallest_loss(items, confidence=confidence)
    text = (
        f"{name}: {items:,} questions show no loss below {100 * least:.2g} points, whatever the "
        f"model; {100 * likely:.2g} if {ASSUMED_CHANGES:.0%} of them change sides"
    )
    if least > margin:
        return f"{text}. They can't show {100 * margin:g} points."
    if likely > margin:
        return f"{text}. To show {100 * margin:g}, fewer must change."
    return f"{text}."
