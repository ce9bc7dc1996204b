"""What `leanmoe prune` writes beside a pruned checkpoint: leanmoe_prune.json."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from leanmoe.core.provenance import Provenance
from leanmoe.core.schema import StoredFile


@dataclass(frozen=True)
class RankedBy:
    """The criterion that experts were ranked by."""

    title: str
    source: str


@dataclass(frozen=True)
class PruneReport(StoredFile):
    """How experts were ranked, and which remain in each MoE layer."""

    KIND: ClassVar[str] = "leanmoe_prune"
    WHAT: ClassVar[str] = "report of prune"

    settings: dict[str, Any]
    criterion: RankedBy
    calibration_tokens: int
    protected: tuple[tuple[int, ...], ...]
    """Layer and expert of those with extreme outputs, which remain whatever their score."""
    provenance: Provenance
    kept: tuple[tuple[int, ...], ...] = ()
    """The experts that remain, layer by layer; a plan holds them in its rules instead."""


@dataclass(frozen=True)
class PruneResults:
    """What a pruning wrote: a checkpoint's folder, or the file of a plan."""

    output: Path
    experts: int
    """The experts of a layer before."""
    kept: tuple[tuple[int, ...], ...]
    """The experts that remain, layer by layer."""
    protected: tuple[tuple[int, int], ...]
    bytes_before: int
    bytes_after: int
    trial: str | None = None
    """Whether the written checkpoint was run once, or why not; None for a plan."""
