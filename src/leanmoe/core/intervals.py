"""Intervals as statistics give them and results files hold them, beside their confidence."""

from __future__ import annotations

from dataclasses import dataclass, field

from leanmoe.core.errors import LeanMoeError


@dataclass(frozen=True)
class Margin:
    """The largest increase in next-token loss to accept: a share of the full model's, or nats."""

    value: float
    in_nats: bool = False

    @classmethod
    def parse(cls, text: str | float, name: str = "--margin") -> Margin:
        """Reads "0.5%", "0.005" or "0.01 nats". Raises LeanMoeError for anything else."""
        words = str(text).strip()
        number = words.removesuffix("nats").strip()
        in_nats = number != words
        try:
            value = float(number.removesuffix("%")) / (100 if number.endswith("%") else 1)
        except ValueError:
            value = 0.0
        if not 0 < value < 1 or (in_nats and number.endswith("%")):
            raise LeanMoeError(
                f"{name} is {words!r}: it must be a share like 0.5% or nats a token like "
                "'0.01 nats', above 0 and below 1"
            )
        return cls(value, in_nats)

    def show(self, change: float) -> str:
        """An increase in the margin's unit: "+0.50%" or "+0.0100 nats"."""
        return f"{change:+.4f} nats" if self.in_nats else f"{change:+.2%}"

    def __str__(self) -> str:
        return f"{self.value:g} nats" if self.in_nats else f"{self.value:.2%}"


@dataclass(frozen=True)
class LossChange:
    """A plan's next-token loss over the full model's: (plan − full) / full, paired by document."""

    ratio: float
    low: float
    high: float
    upper_bound: float
    """The one-sided bound that verdicts are by."""
    documents: int
    sources: int | None = field(default=None, kw_only=True)
    """What documents are from (packages, books, sites): the units. Not in files of before 0.2."""


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
