"""How sure we are of what a plan costs: paired statistics over documents. Needs no torch.

The cost of a plan is the relative increase of next-token loss, Σ loss(plan) / Σ loss(full) − 1:
sums over tokens, so long documents weigh more. Tokens of a document are alike, and so are documents
of one source (a package, a book, a site): neither must count as independent. Sources do, so losses
are summed by source first. Both models read the same tokens, so what varies is the difference
alone. Two bounds are computed, and the worse one counts:

- t: the linearised variance of a ratio (Cochran, Sampling Techniques, 3rd ed., section 6.4) with
  each source's residual divided by 1 − its leverage: the jackknife over clusters (HC3 where a
  source is one document, CR3 otherwise; MacKinnon and White 1985, Bell and McCaffrey 2002). It has
  as many degrees of freedom as equally long sources would give the same concentration of tokens.
  This holds where a few long sources make up much of the text.
- bootstrap-t over sources (Efron and Tibshirani, An Introduction to the Bootstrap, section 12.5).
  This holds where a few sources are harmed far more than the rest, where t is too sure.

Where a plan's loss depends on who shares a batch, batches are drawn several times: the mean over
draws counts, and the reach of a t interval over the draws is added to either bound, squared.

What no sample can show is harm that it does not hold: `rarest_harm_seen`.

Many plans are tested on the same text without letting the choice of the best bias the verdict:
`fixed_sequence`; where there is no order, verdicts share the error: `holm`.

Letters: U units (documents, then sources), Z random draws (batches, bootstrap replicates).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol, TypeVar

import numpy as np
from scipy import stats

from leanmoe.core.errors import LeanMoeError
from leanmoe.core.intervals import LossChange, Margin
from leanmoe.stats.losses import Counts, Floats, Losses, require_paired

CONFIDENCE = 0.95
POWER = 0.8
REPLICATES = 4000
REPLICATES_AT_ONCE = 500
SMALLEST_ERROR = 1e-3
"""The least standard error of a replicate, as a share of the sample's own."""
MINIMUM_DOCUMENTS = 20

Candidate = TypeVar("Candidate")


class _Accepting(Protocol):
    @property
    def accepted(self) -> bool: ...


Judged = TypeVar("Judged", bound=_Accepting)


@dataclass(frozen=True)
class Estimate(LossChange):
    """A ratio of sums over sources, and what a bound on it is judged by."""

    spread: float = 0.0
    """Standard error times √sources: what one more source adds is judged by it."""
    confidence: float = CONFIDENCE
    judged: float = math.inf
    """`upper_bound` with this verdict's part of the error; the same where it has all of it."""

    def to_json(self) -> dict[str, Any]:
        """The fields of `LossChange`, which results files hold."""
        return {each.name: getattr(self, each.name) for each in fields(LossChange)}


@dataclass(frozen=True)
class Verdict:
    """Whether a plan's loss is within the margin, and why."""

    accepted: bool
    loss: Estimate
    nats: Estimate
    margin: Margin
    reason: str


def loss_increase(
    full: Losses,
    plan: Losses | Sequence[Losses],
    confidence: float = CONFIDENCE,
    seed: int = 0,
    in_nats: bool = False,
    sharing: int = 1,
) -> Estimate:
    """Relative increase in next-token loss from `full` to `plan`, or the increase in nats a token.

    `plan` may be several: the same plan's losses, each with batches drawn anew. For `sharing` see
    `ratio_of_sums`. Raises LeanMoeError when not all are of the same tokens, or sources are too
    few.
    """
    draws = [plan] if isinstance(plan, Losses) else plan
    for each in draws:
        require_paired(full, each)
    change_ZU = np.stack([each.loss_U - full.loss_U for each in draws])
    base_U = full.tokens_U.astype(np.float64) if in_nats else full.loss_U
    return ratio_of_sums(change_ZU, base_U, confidence, seed, full.units(), sharing)


def loss_difference(
    full: Losses, first: Losses, second: Losses, confidence: float = CONFIDENCE, seed: int = 0
) -> Estimate:
    """How much more `first` loses than `second`, relative to the full model's loss.

    Raises LeanMoeError when the three are not of the same tokens, or documents are too few.
    """
    require_paired(full, first)
    require_paired(full, second)
    change_U = first.loss_U - second.loss_U
    return ratio_of_sums(change_U, full.loss_U, confidence, seed, full.units())


def non_inferior(
    full: Losses,
    plan: Losses | Sequence[Losses],
    margin: Margin,
    confidence: float = CONFIDENCE,
    seed: int = 0,
    sharing: int = 1,
) -> Verdict:
    """Accepts the plan only if, with `confidence`, its loss increase is at most `margin`.

    For `plan` as several draws see `loss_increase`. `sharing` verdicts share the error (`holm`).
    """
    loss = loss_increase(full, plan, confidence, seed, sharing=sharing)
    nats = loss_increase(full, plan, confidence, seed, in_nats=True, sharing=sharing)
    judged = nats if margin.in_nats else loss
    shown = (
        f"loss {margin.show(judged.ratio)}, at most {margin.show(judged.upper_bound)} with "
        f"{100 * confidence:g}%"
    )
    if sharing > 1:
        shown += f", {margin.show(judged.judged)} where {sharing} verdicts share the error"
        confidence = 1 - (1 - confidence) / sharing
    if judged.judged <= margin.value:
        return Verdict(True, loss, nats, margin, f"{shown}: within the margin of {margin}")
    reason = f"{shown}: above the margin of {margin}"
    if judged.ratio < margin.value:
        true = max(judged.ratio, 0.0)
        needed = documents_needed(judged.spread, margin.value, confidence, true)
        reason += (
            f"; if it truly loses {margin.show(judged.ratio)}, about {needed:,} independent "
            "documents like these would show that it is within "
            f"(there were {judged.sources})"
        )
    return Verdict(False, loss, nats, margin, reason)


def ratio_of_sums(
    change: Floats,
    base_U: Floats,
    confidence: float = CONFIDENCE,
    seed: int = 0,
    units_U: Counts | None = None,
    sharing: int = 1,
) -> Estimate:
    """Σ change / Σ base with intervals; each source is a unit, drawn from many like it.

    `change` is [U] or, by batch draw, [Z,U]; `units_U` numbers each document's source (without: a
    source each). Documents with base 0 (nothing predicted) are left out. Where `sharing` verdicts
    share the error, `judged` has that part of it. Raises LeanMoeError when too few sources remain
    or a sum is not a finite number.
    """
    change_ZU = np.atleast_2d(change)
    if not (np.isfinite(change_ZU).all() and np.isfinite(base_U).all()):
        raise LeanMoeError("losses hold NaN or infinity: they cannot be compared")
    measured_U = base_U > 0
    documents = int(measured_U.sum())
    numbers_U = np.arange(len(base_U)) if units_U is None else units_U
    of_unit_U = np.unique(numbers_U[measured_U], return_inverse=True)[1]
    draws_Z = change_ZU[:, measured_U].sum(1) / base_U.sum()
    change_U = np.bincount(of_unit_U, change_ZU.mean(0)[measured_U]).astype(np.float64)
    base_U = np.bincount(of_unit_U, base_U[measured_U]).astype(np.float64)
    require_documents(len(base_U), confidence)
    share_U = base_U / base_U.sum()
    ratio = float(change_U.sum() / base_U.sum())
    residual_U = share_U * (change_U / base_U - ratio)
    t_error = float(np.sqrt(np.square(residual_U / (1 - share_U)).sum()))
    freedom = max(1 / float(np.square(share_U).sum()) - 1, 1.0)
    studentised_Z = _bootstrap_t(residual_U, share_U, seed)
    bootstrap_error = float(np.sqrt(np.square(residual_U).sum()))

    def drawn(miss: float) -> float:
        """What the mean over batch draws may be off by for their number."""
        if len(draws_Z) < 2:
            return 0.0
        error = float(draws_Z.std(ddof=1)) / math.sqrt(len(draws_Z))
        return float(stats.t.ppf(1 - miss, len(draws_Z) - 1)) * error

    def below(miss: float) -> float:
        """The ratio less what it may be too high by; the truth is lower with probability `miss`."""
        t = float(stats.t.ppf(1 - miss, freedom)) * t_error
        bootstrap = float(np.quantile(studentised_Z, 1 - miss)) * bootstrap_error
        return ratio - math.hypot(max(t, bootstrap), drawn(miss))

    def above(miss: float) -> float:
        """The ratio plus what it may be too low by; the truth is higher with probability `miss`."""
        t = float(stats.t.ppf(1 - miss, freedom)) * t_error
        bootstrap = -float(np.quantile(studentised_Z, miss)) * bootstrap_error
        return ratio + math.hypot(max(t, bootstrap), drawn(miss))

    miss = 1 - confidence
    return Estimate(
        ratio=ratio,
        low=below(miss / 2),
        high=above(miss / 2),
        upper_bound=above(miss),
        judged=above(miss / sharing),
        documents=documents,
        sources=len(base_U),
        spread=t_error * math.sqrt(len(base_U)),
        confidence=confidence,
    )


def _bootstrap_t(residual_U: Floats, share_U: Floats, seed: int) -> Floats:
    """[Z] of (replicate's ratio - ratio) / replicate's standard error, documents drawn again.

    `residual_U` and `share_U` are each document's linearised residual and share of the base; they
    sum to 0 and 1.
    """
    draw = np.random.default_rng(seed)
    count = len(residual_U)
    moments_U5 = np.stack(
        [share_U, residual_U, share_U**2, share_U * residual_U, residual_U**2], axis=1
    )
    # Replicates without the one document that differs have no variance but rounding.
    least = max(SMALLEST_ERROR**2 * float(np.square(residual_U).sum()), np.finfo(float).tiny)
    parts = []
    for start in range(0, REPLICATES, REPLICATES_AT_ONCE):
        replicates = min(REPLICATES_AT_ONCE, REPLICATES - start)
        places_ZU = draw.integers(count, size=(replicates, count))
        places_ZU += count * np.arange(replicates)[:, None]
        times_ZU = np.bincount(places_ZU.ravel(), minlength=replicates * count).reshape(-1, count)
        base, change, base2, cross, change2 = (times_ZU @ moments_U5).T
        off = change / base
        variance = np.maximum(change2 - 2 * off * cross + off**2 * base2, least)
        parts.append(off * base / np.sqrt(variance))
    return np.concatenate(parts)


def rarest_harm_seen(sources: int, confidence: float = CONFIDENCE) -> float:
    """The smallest share of harmed sources that a sample of so many surely holds one of.

    Where all the harm is in a smaller share q, a sample without any has probability (1 − q)^sources
    above 1 − confidence, and no test can tell it from no harm.
    """
    return 1 - float((1 - confidence) ** (1 / sources))


def fewest_documents(confidence: float = CONFIDENCE) -> int:
    """At least 20 documents, and 1 / (1 - confidence), to judge by.

    With fewer, documents as rare as the error that is allowed are more likely absent than there.
    """
    return max(MINIMUM_DOCUMENTS, math.ceil(1 / (1 - confidence) - 1e-9))


def require_documents(documents: int, confidence: float = CONFIDENCE) -> None:
    """Raises LeanMoeError, saying how many are needed, when sources are too few to judge by."""
    needed = fewest_documents(confidence)
    if documents < needed:
        raise LeanMoeError(
            f"too few documents for {confidence:.4g} confidence: {documents} independent ones "
            f"(sources) found, {needed} needed"
        )


def documents_needed(
    spread: float,
    margin: float,
    confidence: float = CONFIDENCE,
    loss: float = 0.0,
    power: float = POWER,
) -> int:
    """Documents with which a plan that truly loses `loss` is accepted with probability `power`.

    `spread` is that of an `Estimate` on documents like those. Raises LeanMoeError when the loss is
    not below the margin, which no number of documents would show.
    """
    if loss >= margin:
        raise LeanMoeError(
            f"loss {loss:.4g} is not below the margin {margin:.4g}: no number of documents suffices"
        )
    normal = float(stats.norm.ppf(confidence) + stats.norm.ppf(power))
    # From below, where t quantiles are taken for normal ones: a step or two short.
    needed = max(MINIMUM_DOCUMENTS, math.floor((normal * spread / (margin - loss)) ** 2))
    while smallest_detectable(spread, needed, confidence, power) > margin - loss:
        needed += 1
    return needed


def smallest_detectable(
    spread: float, documents: int, confidence: float = CONFIDENCE, power: float = POWER
) -> float:
    """The margin within which a plan that loses nothing is accepted with probability `power`.

    So many standard errors of the mean: the bound's quantile and the luck's.
    """
    quantiles = stats.t.ppf([confidence, power], documents - 1)
    return float(quantiles.sum()) * spread / math.sqrt(documents)


def fixed_sequence(
    ordered: Iterable[Candidate], accepts: Callable[[Candidate], bool]
) -> tuple[Candidate, ...]:
    """The leading candidates that `accepts` all accept: testing stops at the first that fails.

    Testing many plans at 95% each and keeping the fastest that passes would accept a bad one more
    often than 1 time in 20. In an order that was fixed before the text was looked at, each can be
    tested at the full 95%: a bad plan is accepted only if the first bad plan in the order is, and
    that is one test at 95%. (Fixed-sequence procedure: Maurer, Hothorn and Lehmacher 1995; Westfall
    and Krishen 2001.) So order from safest to fastest by the search's own text, and test on text
    it never saw. The price: a fast plan behind a slower one that fails is not tested.
    """
    accepted: list[Candidate] = []
    for candidate in ordered:
        if not accepts(candidate):
            break
        accepted.append(candidate)
    return tuple(accepted)


def holm(verdicts: Sequence[Callable[[int], Judged]]) -> tuple[Judged, ...]:
    """Each verdict, made so that the chance of any wrong acceptance is what one's would be.

    A verdict is made from how many share the error: first all do, then those that are not accepted
    yet, until no more are. This is Holm's procedure (Scandinavian Journal of Statistics 6, 1979),
    by bounds instead of p values. It needs no order, and holds however verdicts hang together, as
    those on the same questions do.
    """
    found: dict[int, Judged] = {}
    left = list(range(len(verdicts)))
    sharing = 0
    while len(left) != sharing:
        sharing = len(left)
        found |= {number: verdicts[number](sharing) for number in left}
        left = [number for number in left if not found[number].accepted]
    return tuple(found[number] for number in range(len(verdicts)))
