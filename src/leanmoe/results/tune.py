"""What `leanmoe tune` writes: results.json."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from leanmoe.core.intervals import (
    LossChange,
    LossGap,
    Margin,
    PairedRatio,
    RatioOfRuns,
    ReplyLengths,
)
from leanmoe.core.provenance import Provenance, StepsMadeWith
from leanmoe.core.schema import StoredFile, stored_as
from leanmoe.models.shape import Fingerprint
from leanmoe.plan import Band, Plan, Rule

Phase = Literal["prompt", "decode"]
BudgetKind = Literal["slots", "distinct"]


@dataclass(frozen=True)
class TunedModel:
    """The model that was tuned, and what ran its experts."""

    name: str
    fingerprint: Fingerprint
    parameters: int
    active_parameters: int
    dtype: str
    experts_implementation: str


@dataclass(frozen=True)
class TextPart:
    """A part of the text."""

    documents: int
    tokens: int
    sources: int | None = None
    """What the documents are from: the units of statistics. Not in files of before 0.2."""


@dataclass(frozen=True)
class KindOfText:
    """Held-out text of one kind: what a proof is for."""

    name: str
    source: str
    heldout: TextPart
    overlap: float
    """The share of its runs of 13 words that stand in calibration text of any kind."""
    rarest_harm: float
    """Harm in a smaller share of the sources may be in none of those that were drawn."""


@dataclass(frozen=True)
class TuneText:
    """The text: what plans were searched on and what they were proven on."""

    source: str
    calibration: TextPart
    heldout: TextPart
    kinds: tuple[KindOfText, ...] = ()


@dataclass(frozen=True)
class KindLoss:
    """What a plan costs on one kind of text."""

    kind: str
    loss: LossChange
    nats: LossChange
    """The increase in nats a token, not relative."""
    divergence: float
    """KL from the full model, nats a token."""
    flips: float
    """The share of tokens whose likeliest next token is another than the full model's."""
    worst_tenth: float
    """The relative increase in loss over the tenth of the documents that it is largest in."""
    batch_draws: int
    accepted: bool
    reason: str

    @property
    def perplexity(self) -> float:
        """The bound as a relative increase in perplexity."""
        return math.expm1(self.nats.upper_bound)


@dataclass(frozen=True)
class DistinctExperts:
    """Distinct experts of a step with so many tokens, measured and by the uniform formula."""

    tokens: int
    documents: int
    measured: float
    error: float
    uniform: float


@dataclass(frozen=True)
class LayerProfile:
    """What the router of one MoE layer does on the calibration text."""

    layer: int
    decoder_layer: int
    use: tuple[float, ...]
    """Each expert's share of all slots."""
    mass: tuple[float, ...]
    """The share of a token's gate mass that its best 1, 2, ... experts carry."""
    distinct: tuple[DistinctExperts, ...]
    gate: tuple[float, ...] = ()
    """This and what follows stands in files of 0.1.0 alone."""
    mass_quantiles: tuple[tuple[float, ...], ...] = ()
    pairs: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class ProfileSummary:
    """What the model's routers do on the calibration text."""

    label: str
    tokens: int
    documents: int
    layers: tuple[LayerProfile, ...]
    quantiles: tuple[float, ...] = ()
    """In files of 0.1.0 alone."""


@dataclass(frozen=True)
class Candidate:
    """A rule in one MoE layer, for prompt tokens or for the tokens of decode steps."""

    phase: Phase
    layer: int
    rule: Rule
    decode_batch: int = field(metadata=stored_as("together"))
    """Requests that decode at once; 1 for rules that are not batch-aware."""

    def plan(self, model: Fingerprint) -> Plan:
        """The plan that changes this layer alone, for tokens of its phase alone."""
        nothing = (Rule(),) * model.moe_layers
        rules = (*nothing[: self.layer], self.rule, *nothing[self.layer + 1 :])
        if self.phase == "prompt":
            return Plan.banded(model, prompt=rules)
        return Plan.banded(model, (Band(None, rules),), nothing)

    def serves(self, decode_batch: int) -> bool:
        """Whether what was measured of it holds in steps of so many requests."""
        return not self.rule.is_batch_aware or self.decode_batch == decode_batch


@dataclass(frozen=True)
class Sensitivity(Candidate):
    """What a candidate costs in next-token prediction, and what it activates."""

    divergence: float
    """KL from the full model, nats per predicted token."""
    loss_difference: float
    """Next-token loss over the full model's, nats per predicted token."""
    slots: float
    """Mean experts a token of the candidate's phase uses in its layer."""
    distinct: float
    """Mean distinct experts a step of the candidate's phase activates in its layer."""


@dataclass(frozen=True)
class SensitivitySummary:
    """All rules tried in single layers."""

    label: str
    tokens: int
    candidates: tuple[Sensitivity, ...]


@dataclass(frozen=True)
class ValidatedPlan:
    """A plan run on held-out text: its loss, its modelled time, and whether it was accepted."""

    name: str
    strategy: str
    predicted_loss: float
    modelled_time: float
    """Time of the MoE layers, as a share of the full model's."""
    slots: float
    slots_per_layer: tuple[float, ...]
    distinct: float
    loss: LossChange
    accepted: bool
    reason: str
    chosen: bool
    rules: tuple[Rule, ...]
    prompt: tuple[Rule, ...]
    kinds: tuple[KindLoss, ...] = ()
    """On each kind of text; `loss` is that of the worst."""


@dataclass(frozen=True)
class LoadFront:
    """The plans validated for one concurrency, safest first."""

    concurrency: int
    points: tuple[ValidatedPlan, ...]
    level: str = ""
    """The plan's level that they may become; empty in files of before levels, as elsewhere."""


@dataclass(frozen=True)
class StrategyBudget:
    """What strategies were compared at: so many `slots` a token or `distinct` experts a step."""

    kind: BudgetKind
    value: float


@dataclass(frozen=True)
class StrategyRow:
    """What one strategy loses on the budget; `against` compares it with leanmoe's own."""

    strategy: str
    title: str
    source: str
    slots: float
    distinct: float
    loss: LossChange
    rules: tuple[Rule, ...]
    against: LossGap | None = None


@dataclass(frozen=True)
class StrategyTable:
    """All strategies on one budget at one concurrency."""

    concurrency: int
    budget: StrategyBudget
    rows: tuple[StrategyRow, ...]


@dataclass(frozen=True)
class PruneOrSkipVerdict(LossChange):
    """Which of pruning and skipping loses less: (skipping − pruning) / full."""

    verdict: str


@dataclass(frozen=True)
class PruneOrSkipRow:
    """One of pruning, skipping and both at a concurrency and a memory budget."""

    concurrency: int
    budget: str
    way: str
    memory: float
    time: float
    loss: LossChange
    against: PruneOrSkipVerdict | None = None


@dataclass(frozen=True)
class LatencySpread:
    """A latency over requests, in milliseconds."""

    mean: float
    median: float
    p90: float
    p99: float
    std: float | None = None


@dataclass(frozen=True)
class MeasuredRun:
    """One variant under load: medians over its repeats."""

    duration: float
    request_throughput: float
    output_throughput: float
    total_token_throughput: float
    ttft_ms: LatencySpread
    tpot_ms: LatencySpread | None
    itl_ms: LatencySpread | None
    e2el_ms: LatencySpread
    runs: tuple[float, ...]
    """Output tokens a second of each repeat."""
    completed: int | None = None
    failed: int | None = None
    total_input_tokens: int | None = None
    total_output_tokens: int | None = None
    request_goodput: float | None = None
    delay_ms: LatencySpread | None = None
    short_replies: int = 0


@dataclass(frozen=True)
class LoadGain:
    """Throughput of the plan over the full model's at one concurrency."""

    concurrency: int
    input_tokens: int
    output_tokens: int
    requests: int
    variants: dict[str, MeasuredRun]
    label: str
    ratio: RatioOfRuns
    notes: tuple[str, ...] = ()
    level: str = ""


@dataclass(frozen=True)
class LoadVerdict:
    """Whether a level of the plan was accepted for one concurrency, and why."""

    concurrency: int
    up_to: int | None
    accepted: bool
    loss: LossChange | None
    gain: RatioOfRuns | None
    reason: str
    kinds: tuple[KindLoss, ...] = ()
    """On each kind of text; `loss` is that of the worst."""
    level: str = ""
    replies: ReplyLengths | None = None
    per_request: PairedRatio | None = None
    """The gain per finished request: throughput over reply length; None where not measurable."""


@dataclass(frozen=True)
class TuneResults(StoredFile):
    """The results.json of a tune run."""

    KIND: ClassVar[str] = "leanmoe_results"
    WHAT: ClassVar[str] = "results of tune"

    provenance: Provenance
    model: TunedModel
    settings: dict[str, Any]
    text: TuneText
    profile: ProfileSummary
    sensitivity: SensitivitySummary
    fronts: tuple[LoadFront, ...]
    strategies: tuple[StrategyTable, ...]
    gain: tuple[LoadGain, ...]
    verdicts: tuple[LoadVerdict, ...]
    notes: tuple[str, ...]
    seconds: dict[str, float]
    peak_memory_bytes: int
    total_or_activated: tuple[PruneOrSkipRow, ...] = ()
    made_with: tuple[StepsMadeWith, ...] = ()
    """All code, weights and machines that took part."""

    @property
    def confidence(self) -> float:
        """The confidence that every interval and verdict was asked for."""
        return float(self.settings["confidence"])

    @property
    def margins(self) -> dict[str, Margin]:
        """The increase in loss that each level may have at most, by its name."""
        if "margins" in self.settings:
            return {each.name: each for each in (Margin(**m) for m in self.settings["margins"])}
        stored = self.settings["margin"]
        return {"": Margin(**stored) if isinstance(stored, dict) else Margin(float(stored))}

    def of_level(self, name: str) -> TuneResults:
        """What the run found of one level alone."""
        return replace(
            self,
            fronts=tuple(each for each in self.fronts if each.level == name),
            gain=tuple(each for each in self.gain if each.level == name),
            verdicts=tuple(each for each in self.verdicts if each.level == name),
        )

    @property
    def keep(self) -> str | None:
        """The memory budget: the experts that remain, where one was asked for."""
        kept: str | None = self.settings.get("keep")
        return kept

    def at_work(self, verdict: LoadVerdict) -> str:
        """What a load runs: rules for prompts and a memory budget hold at every load of a plan."""
        if verdict.accepted:
            return "the plan"
        own = self.of_level(verdict.level)
        accepted = {each.concurrency for each in own.verdicts if each.accepted}
        chosen = [(f.concurrency, p) for f in own.fronts for p in f.points if p.chosen]
        if self.keep is not None and chosen:
            return "the experts kept"
        prompts = (rule for load, point in chosen if load in accepted for rule in point.prompt)
        return "prompt rules alone" if any(rule != Rule() for rule in prompts) else "full model"


def percent(share: float, digits: int = 2) -> str:
    """0.0123 -> "+1.23%": relative changes keep their sign."""
    return f"{100 * share:+.{digits}f}%"
