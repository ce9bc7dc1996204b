"""What `leanmoe study` writes: study.json."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from leanmoe.core.intervals import LossChange, RatioOfRuns
from leanmoe.core.provenance import Provenance
from leanmoe.core.schema import StoredFile, stored_as
from leanmoe.results.tune import TextPart

BY_K = dict[str, float]
"""Figures by the experts a token, as text."""


@dataclass(frozen=True)
class Claim:
    """A claim of the paper's beside what was found."""

    claim: str
    paper: str
    ours: str
    verdict: str
    why: str


@dataclass(frozen=True)
class LayerCost:
    """Bytes read and products of one MoE layer's step."""

    weight_bytes: float
    distinct: float | None = None
    activation_bytes: float | None = None
    flops: float | None = None
    intensity: float | None = None


@dataclass(frozen=True)
class AnalysedStep:
    """A step of so many tokens in a fine-grained and a coarse-grained layer."""

    tokens: int
    fine: LayerCost
    coarse: LayerCost
    as_the_paper: LayerCost


@dataclass(frozen=True)
class Analysis:
    """Arithmetic intensity of DeepSeek-V3's layer and of a coarse-grained one."""

    label: str
    model: str
    ridge: float
    """FLOP a byte above which the GPU is bound by products."""
    too_much: float
    """Times the bytes of a token's experts, with the shared expert's width of Table 1."""
    compute_bound_from: dict[str, int]
    rows: tuple[AnalysedStep, ...]


@dataclass(frozen=True)
class Table9Row:
    """One concurrency of the paper's Table 9: tokens a second and gains in percent, by k."""

    concurrency: int
    ours: BY_K
    paper: BY_K
    full_off: float
    gain: BY_K
    paper_gain: BY_K
    off: BY_K
    broken: tuple[int, ...]
    saved_ms: BY_K
    least_gain: BY_K


@dataclass(frozen=True)
class KeptExperts:
    """Gains of keeping this share of the experts, in percent, at each concurrency."""

    share: float
    gain: tuple[float, ...]


@dataclass(frozen=True)
class Table9Cell:
    """A cell of Table 9; by how many points it breaks the table's own trend."""

    concurrency: int
    k: int
    points: float | None = None


@dataclass(frozen=True)
class Table9:
    """The paper's Table 9 modelled."""

    label: str
    machine: str
    kernel: str
    step_overhead_ms: float
    rows: tuple[Table9Row, ...]
    kept_experts: tuple[KeptExperts, ...]
    within: int
    counted: int
    out_of_reach: tuple[Table9Cell, ...]
    trend_breaks: tuple[Table9Cell, ...]
    full_off: float
    stands_on: str


@dataclass(frozen=True)
class Assumption:
    """How near Table 9 comes under another assumption."""

    assumption: str
    within: int
    counted: int
    mean_off: float
    full_off: float
    step_overhead_ms: float


@dataclass(frozen=True)
class V2LiteRow:
    """One concurrency of DeepSeek-V2-Lite: gains in percent by setting."""

    concurrency: int
    throughput: float
    gain: dict[str, float]
    paper_gain: float


@dataclass(frozen=True)
class V2Lite:
    """The paper's figures for DeepSeek-V2-Lite modelled."""

    label: str
    machine: str
    rows: tuple[V2LiteRow, ...]
    stands_on: str


@dataclass(frozen=True)
class CurvePoint:
    """What half the experts a token gain in a step of so many tokens, in percent."""

    tokens: int
    distinct: float
    experts_gain: float
    step_gain: float
    experts_ms: float
    step_ms: float


@dataclass(frozen=True)
class Regimes:
    """Where a curve peaks, is flat, is lowest and rises again, in tokens of a step."""

    is_u: bool
    peak: int
    lowest: int
    peak_gain: float = 0.0
    lowest_gain: float = 0.0
    flat_from: int | None = None
    rises_from: int | None = None


@dataclass(frozen=True)
class UShape:
    """What a lower k gains over the tokens of a decode step, for one model."""

    label: str
    model: str
    machine: str
    top_k: int
    lower: int
    rows: tuple[CurvePoint, ...]
    regimes: Regimes
    stands_on: str


@dataclass(frozen=True)
class Banded:
    """Gains of plans in percent at each concurrency."""

    label: str
    machine: str
    concurrency: tuple[int, ...]
    gains: dict[str, tuple[float, ...]]


@dataclass(frozen=True)
class QualityRow:
    """The change in loss under one setting."""

    group: str
    name: str
    slots: float | None
    share: float
    increase: LossChange


@dataclass(frozen=True)
class StudiedQuality:
    """Settings of the paper's on a model that was measured."""

    label: str
    model: str
    text: str
    provenance: Provenance
    quick: bool
    heldout: TextPart
    rows: tuple[QualityRow, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    confidence: float = 0.95
    """Files from before it was stored were all made with the default."""


@dataclass(frozen=True)
class SearchedLoad:
    """What a searched plan gave at one concurrency."""

    concurrency: int
    accepted: bool
    gain: RatioOfRuns | None
    loss: LossChange | None


@dataclass(frozen=True)
class SearchedPlan:
    """What a plan that `leanmoe tune` found gave where it was measured."""

    label: str
    model: str
    hardware: str
    commit: str
    rows: tuple[SearchedLoad, ...]
    confidence: float = 0.95
    """Files from before it was stored were all made with the default."""


@dataclass(frozen=True)
class ErrorSummary:
    """Absolute relative errors of a kernel's model on rows that it was not fitted to."""

    what: str
    rows: int
    mean: float
    p99: float
    worst: float
    is_interpolated: bool


@dataclass(frozen=True)
class KernelErrors:
    """How far off one kernel's constants have been."""

    kernel: str
    dtype: str
    gpu: str
    summaries: tuple[ErrorSummary, ...] = field(metadata=stored_as("accuracy"))


@dataclass(frozen=True)
class StudyResults(StoredFile):
    """The study.json of a study."""

    KIND: ClassVar[str] = "leanmoe_study"
    WHAT: ClassVar[str] = "results of study"

    provenance: Provenance
    analysis: Analysis
    table_9: Table9
    v2_lite: V2Lite
    u_shapes: tuple[UShape, ...]
    banded: Banded
    quality: StudiedQuality | None
    searched: SearchedPlan | None
    accuracy: tuple[KernelErrors, ...]
    claims: tuple[Claim, ...]
    what_moves: tuple[Assumption, ...] = ()
