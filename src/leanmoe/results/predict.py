"""What `leanmoe predict --sweep` writes: every configuration, fronts and the cheapest."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from leanmoe.core.schema import StoredFile, stored_as


@dataclass(frozen=True)
class SweptPoint:
    """One configuration, modelled: tokens a second, and milliseconds."""

    plan: str
    gpus: int
    tensor: int
    expert: int
    data: int
    pipeline: int
    concurrency: int
    output_throughput: float
    ttft_ms: float
    tpot_ms: float
    per_user: float
    per_gpu: float

    @property
    def place(self) -> str:
        """The deployment in few letters."""
        sizes = {"TP": self.tensor, "EP": self.expert, "DP": self.data, "PP": self.pipeline}
        named = [f"{name}{size}" for name, size in sizes.items() if size > 1 or name == "TP"]
        return f"{self.gpus} GPUs, {' '.join(named)}"


@dataclass(frozen=True)
class CheapestPoint:
    """For one plan the deployment that is fast enough with the fewest GPUs a token."""

    plan: str
    point: SweptPoint | None
    cost_a_million: float | None = None
    target_throughput: float | None = None
    gpus: int | None = None
    gpus_saved: int | None = None
    gpus_saved_share: float | None = None


@dataclass(frozen=True)
class SweepLimits:
    """What a deployment had to keep to, and the price of a GPU and hour."""

    tpot_ms: float | None
    ttft_ms: float | None
    price: float | None

    def __str__(self) -> str:
        limits = {"TPOT": self.tpot_ms, "TTFT": self.ttft_ms}
        words = [f"{name} at most {most:g} ms" for name, most in limits.items() if most is not None]
        return ", ".join(words) or "No limit was set"


@dataclass(frozen=True)
class SweepResults(StoredFile):
    """Everything that a sweep compared."""

    KIND: ClassVar[str] = "leanmoe_sweep"
    WHAT: ClassVar[str] = "results of predict --sweep"

    label: str
    how: str
    model: str
    gpu: str
    lengths: str = field(metadata=stored_as("load"))
    kernel: str
    configurations: int
    seconds: float
    deployments: tuple[str, ...]
    refused: dict[str, str]
    points: tuple[SweptPoint, ...]
    fronts: dict[str, tuple[SweptPoint, ...]]
    cheapest: tuple[CheapestPoint, ...]
    limits: SweepLimits
