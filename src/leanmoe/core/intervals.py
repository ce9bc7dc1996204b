"""Intervals as statistics give them and results files hold them, beside their confidence."""

from __future__ import annotations

from dataclasses import dataclass, field

from leanmoe.core.errors import LeanMoeError


@dataclass(frozen=True)
class Margin:
    """The largest increase in next-token loss to accept: a share of the full model's, or nats."""

    value: float
    in_nats: bool = False

    def __post_init__(self) -> None:
        """Raises LeanMoeError for a margin that is not above 0 and below 1."""
        if not 0 < self.value < 1:
            raise LeanMoeError(f"a margin is {self}: it must be above 0 and below 1 (100%)")

    @classmethod
    def parse(cls, name: str, text: str) -> Margin:
        """Reads "0.5%", "0.005" or "0.01 nats". Raises LeanMoeError for anything else."""
        words = text.strip()
        number = words.removesuffix("nats").strip()
        in_nats = number != words
        share = number if in_nats else number.removesuffix("%")
        try:
            value = float(share) / (100 if share != number else 1)
        except ValueError as error:
            raise LeanMoeError(
                f"{name} is {words!r}: it must be a share like 0.5% or nats like '0.01 nats'"
            ) from error
        return cls(value, in_nats)

    @classmethod
    def parse_several(cls, name: str, text: str) -> tuple[Margin, ...]:
        """Reads "0.2%,0.5%" in the same way."""
        return tuple(cls.parse(name, words) for words in text.split(","))

    @property
    def name(self) -> str:
        """What the level of a plan is called that is proven within it: "0.5%" or "0.01-nats"."""
        return str(self).replace(" ", "-")

    def show(self, change: float) -> str:
        """An increase in the margin's unit: "+0.50%" or "+0.0100 nats"."""
        return f"{change:+.4f} nats" if self.in_nats else f"{change:+.2%}"

    def __str__(self) -> str:
        return f"{self.value:g} nats" if self.in_nats else f"{100 * self.value:g}%"


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


@dataclass(frozen=True)
class PairedRatio:
    """A figure under the plan over the full model's, with its interval."""

    ratio: float
    low: float
    high: float


@dataclass(frozen=True)
class ReplyLengths:
    """How much longer a plan's replies are, on prompts that both models end by themselves."""

    prompts: int
    most: int
    """Tokens at which a reply was cut."""
    full_ended: int
    """Replies that end before that; under the plan those of the first batch draw."""
    plan_ended: int | None
    """None where the full model's were too few to go on."""
    both_ended: int
    ratio: PairedRatio | None
    """Mean length under the plan over the full model's; None where too few replies end."""
