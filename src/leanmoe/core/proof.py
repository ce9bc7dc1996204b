"""What a level of a plan was accepted by: the losses proven, and what they were measured with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from leanmoe.core.errors import LeanMoeError, shown
from leanmoe.core.intervals import Margin


@dataclass(frozen=True)
class KindProof:
    """What a level costs on held-out text of one kind, in the margin's unit."""

    kind: str
    source: str
    """Where the text is from."""
    loss: float
    """The increase in next-token loss over the full model's."""
    bound: float
    """The one-sided bound on that increase, at the proof's confidence."""


@dataclass(frozen=True)
class LevelProof:
    """A claim: with this confidence the loss is within the margin on every kind of text.

    It holds for what was measured: these requests at once, this engine, these kernels, this number
    format. Each kind's numbers are those of the concurrency that it loses most at.
    """

    kinds: tuple[KindProof, ...]
    margin: Margin
    confidence: float
    concurrency: tuple[int, ...]
    """Requests at once that it was measured with, fewest first."""
    engine: str
    implementation: str
    """What computed the experts."""
    dtype: str
    hardware: str
    versions: Mapping[str, str]
    commit: str

    def __post_init__(self) -> None:
        """Raises LeanMoeError for a claim that its own numbers do not bear out."""
        names = [each.kind for each in self.kinds]
        if not names or len(set(names)) != len(names):
            raise LeanMoeError(f"kinds are {shown(names)}: at least one is needed, each once")
        if not 0 < self.confidence < 1:
            raise LeanMoeError(f"confidence is {self.confidence}: it must be above 0 and below 1")
        loads = list(self.concurrency)
        if not loads or loads[0] < 1 or loads != sorted(set(loads)):
            raise LeanMoeError(
                f"concurrency is {shown(loads)}: it must hold whole numbers from 1, fewest first"
            )
        for each in self.kinds:
            if not each.loss <= each.bound <= self.margin.value:
                raise LeanMoeError(
                    f"kind {shown(each.kind)} has loss {each.loss} and bound {each.bound}: the "
                    f"bound must be at least the loss and at most the margin, {self.margin}"
                )

    @property
    def worst(self) -> KindProof:
        """The kind that the level loses most on: a level is as good as that."""
        return max(self.kinds, key=lambda each: each.bound)

    @property
    def loss(self) -> float:
        """The increase in loss on the worst kind of text, in the margin's unit."""
        return self.worst.loss

    @property
    def bound(self) -> float:
        """The bound on it."""
        return self.worst.bound
