"""What `leanmoe eval` writes: results.json."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from leanmoe.core.intervals import LossChange, Margin, MeanChange, ReplyLengths
from leanmoe.core.provenance import Provenance, StepsMadeWith
from leanmoe.core.schema import StoredFile, stored_as
from leanmoe.plan import Plan
from leanmoe.results.tune import KindLoss


@dataclass(frozen=True)
class EvaluatedPlan:
    """A plan and what it is called in the tables."""

    name: str
    plan: Plan


@dataclass(frozen=True)
class TaskVerdict:
    """Whether a plan's accuracy is within the margin of the full model's, and why."""

    accepted: bool
    margin: float
    reason: str
    sharing: int = 1
    """Verdicts that shared the error when it was made (Holm); 1 in files of before 0.2."""


@dataclass(frozen=True)
class AnswerChange:
    """Accuracy of a plan less the full model's, paired by question, in shares."""

    items: int
    full: float
    difference: float
    low: float
    high: float
    lower_bound: float
    """The one-sided bound that verdicts are by."""
    lost: int
    gained: int
    """Questions that only the full model, and only the plan, has right; of the first batch draw."""
    mcnemar: float
    """McNemar's exact two-sided p of the first batch draw."""
    smallest_seen: float
    """The smallest loss that so many questions show with power 0.8."""
    batch_draws: int = field(metadata=stored_as("mixes"))
    lowest_draw: float = field(metadata=stored_as("lowest_mix"))
    highest_draw: float = field(metadata=stored_as("highest_mix"))


@dataclass(frozen=True)
class TaskRow(AnswerChange):
    """One plan on one task."""

    plan: str
    task: str
    accuracy: float
    verdict: TaskVerdict
    loss: LossChange | None = None
    """The change in the loss of the right answers."""
    metric: str | None = None


@dataclass(frozen=True)
class AccuracyChange(AnswerChange):
    """The change in accuracy with the plan's own accuracy."""

    plan: float


@dataclass(frozen=True)
class Agreement:
    """For how many tokens greedy replies are those of the full model."""

    same: float
    """The share of replies that are the same to the end."""
    quantiles: dict[str, float]
    mean: float
    tokens: int


@dataclass(frozen=True)
class PairedChange(MeanChange):
    """A mean under the full model and under the plan, and their difference by prompt."""

    full: float
    plan: float


@dataclass(frozen=True)
class DivergencePart(MeanChange):
    """KL from the full model over tokens `first` to `last` of its replies, in nats a token."""

    first: int = field(metadata=stored_as("from"))
    last: int = field(metadata=stored_as("to"))


@dataclass(frozen=True)
class ReplyDivergence:
    """KL from the full model along its replies, and the last part's less the first's."""

    parts: tuple[DivergencePart, ...]
    growth: MeanChange


@dataclass(frozen=True)
class PassAt(PairedChange):
    """pass@n by the unbiased estimator of arXiv 2107.03374."""

    n: int


@dataclass(frozen=True)
class ReplyRow:
    """Replies under one plan beside the full model's."""

    plan: str
    batch_draws: int = field(metadata=stored_as("mixes"))
    agreement: Agreement
    repetition: PairedChange
    length: PairedChange
    divergence: ReplyDivergence
    exact_match: AccuracyChange | None = None
    pass_at: tuple[PassAt, ...] = ()
    finished: ReplyLengths | None = None
    """Lengths of replies that end by themselves; not in files of before 0.2."""


@dataclass(frozen=True)
class Replies:
    """Greedy and drawn replies to prompts."""

    prompts: int
    tokens: int
    concurrency: int = field(metadata=stored_as("together"))
    samples: int
    temperature: float
    rows: tuple[ReplyRow, ...]


@dataclass(frozen=True)
class EvaluatedDomain:
    """Held-out text of one kind."""

    name: str
    unit: str
    units: int
    tokens: int
    full_loss: float


@dataclass(frozen=True)
class DomainRow:
    """The change in loss of one plan on every domain."""

    plan: str
    loss: dict[str, LossChange]


@dataclass(frozen=True)
class DomainMatrix:
    """Plans, some of them calibrated on one domain, on every domain."""

    domains: tuple[EvaluatedDomain, ...]
    calibrate: str | None
    rows: tuple[DomainRow, ...]


@dataclass(frozen=True)
class TransferRow:
    """What a finished plan costs on each domain at one load of its run."""

    concurrency: int
    kinds: tuple[KindLoss, ...]


@dataclass(frozen=True)
class Transfer:
    """A finished plan on text that it was not made for, by the test and the margin of its run."""

    plan: Plan
    margin: Margin
    confidence: float
    rows: tuple[TransferRow, ...]

    @property
    def sharing(self) -> int:
        """The verdicts, which share the error (Holm)."""
        return sum(len(row.kinds) for row in self.rows)


@dataclass(frozen=True)
class EvalResults(StoredFile):
    """The results.json of an evaluation."""

    KIND: ClassVar[str] = "leanmoe_eval"
    WHAT: ClassVar[str] = "results of eval"

    provenance: Provenance
    label: str
    settings: dict[str, Any]
    experts_implementation: str
    plans: tuple[EvaluatedPlan, ...]
    seconds: dict[str, float]
    tasks: tuple[TaskRow, ...] = ()
    generation: Replies | None = None
    domains: DomainMatrix | None = None
    transfer: Transfer | None = None
    made_with: tuple[StepsMadeWith, ...] = ()

    @property
    def confidence(self) -> float:
        """The confidence that every interval and verdict was asked for."""
        return float(self.settings["confidence"])

    @property
    def margin(self) -> float:
        """The points of accuracy, as a share, that a plan may lose at most."""
        return float(self.settings["margin"])

    @property
    def concurrency(self) -> int:
        """Requests that decode in the same steps."""
        return int(self.settings.get("concurrency") or self.settings["decode_batch"])
