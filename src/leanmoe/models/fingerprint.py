"""Which model a plan or a profile was made for. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fingerprint:
    """The model a plan was made for; a plan is refused on any other."""

    architecture: str
    layers: int
    moe_layers: int
    experts: int
    top_k: int
