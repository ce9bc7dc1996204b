"""Intervals as statistics give them and results files hold them, beside their confidence."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LossChange:
    """A plan's next-token loss over the full model's: (plan − full) / full, paired by document."""

    ratio: float
    low: float
    high: float
    upper_bound: float
    """The one-sided bound that verdicts are by."""
    documents: int


@dataclass(frozen=True)
class LossGap:
    """The losses of two plans: (first − second) / full, paired by document."""

    difference: float
    low: float
    high: float


@dataclass(frozen=True)
class RatioOfRuns:
    """A figure of interleaved runs over the same figure of others, paired by repeat."""

    median: float
    low: float
    high: float
    repeats: int


@dataclass(frozen=True)
class MeanChange:
    """A mean over paired units with its interval."""

    mean: float
    low: float
    high: float
