"""What `leanmoe bench` writes: results.json, whole after every run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from leanmoe.core.intervals import RatioOfRuns
from leanmoe.core.provenance import Provenance
from leanmoe.core.schema import StoredFile
from leanmoe.plan import Plan

THROUGHPUT, TPOT = "output_throughput", "median_tpot_ms"
Figures = dict[str, float]
"""The figures of a run by the names that `vllm bench serve` gives them."""


@dataclass(frozen=True)
class Devices:
    """What the throughput of a service is shared by."""

    kind: str
    count: int


@dataclass(frozen=True)
class BenchedVariant:
    """One of the services compared, and what is known of it."""

    name: str
    plan: Plan | None = None
    plan_sha256: str | None = None
    experts_implementation: str | None = None
    url: str | None = None
    served_model: str | None = None
    root: str | None = None


@dataclass(frozen=True)
class BandSamples:
    """How many of the steps seen were in a band of the plan."""

    band: str
    up_to: str
    """The words of the server's /metrics: "none" where the band has no end."""
    samples: int


@dataclass(frozen=True)
class RoutingSeen:
    """What a variant's router did in a load that was not timed, or why it could not be seen."""

    experts_a_token: float | None = None
    distinct_experts_a_step: float | None = None
    rows_a_step: float | None = None
    samples: int | None = None
    bands: tuple[BandSamples, ...] = ()
    label: str | None = None
    missing: str | None = None


@dataclass(frozen=True)
class BenchedLoad:
    """One load: every run, the medians over repeats, and the gains over the first variant."""

    max_concurrency: int | None
    request_rate: float | None
    num_prompts: int
    label: str
    runs: dict[str, tuple[Figures, ...]]
    median: dict[str, Figures]
    gain: dict[str, dict[str, RatioOfRuns]]
    routing: dict[str, RoutingSeen]

    @property
    def is_open(self) -> bool:
        """Whether requests come at a rate of their own."""
        return self.request_rate is not None

    @property
    def value(self) -> float:
        """The load's number: its concurrency, or its requests a second."""
        return float(self.max_concurrency or 0) if self.request_rate is None else self.request_rate

    def __str__(self) -> str:
        return f"{self.request_rate:g} a second" if self.is_open else f"concurrency {self.value:g}"


@dataclass(frozen=True)
class BenchResults(StoredFile):
    """The results.json of a bench, finished or not."""

    KIND: ClassVar[str] = "leanmoe_bench"
    WHAT: ClassVar[str] = "results of bench"

    complete: bool
    stopped: str | None
    provenance: Provenance
    engine: str
    devices: Devices
    model: dict[str, Any]
    text: str
    variants: tuple[BenchedVariant, ...]
    settings: dict[str, Any]
    loads: tuple[BenchedLoad, ...]
    notes: tuple[str, ...]

    @property
    def confidence(self) -> float:
        """The confidence that every interval was asked for."""
        return float(self.settings["confidence"])

    @property
    def dataset(self) -> str | None:
        """The file that gave the prompts, where one was given."""
        given = self.settings.get("dataset_path", self.settings.get("dataset"))
        return None if given is None else str(given)

    @property
    def names(self) -> tuple[str, ...]:
        """The variants' names; the first is what the others are compared with."""
        return tuple(variant.name for variant in self.variants)

    @property
    def gained(self) -> str:
        """The figure of a gain: throughput, or TPOT where a rate sets the throughput."""
        return TPOT if any(load.is_open for load in self.loads) else THROUGHPUT
