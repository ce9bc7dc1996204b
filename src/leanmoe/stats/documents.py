"""Per-document sums of next-token loss and divergence: what the statistics are paired by.

Needs no torch. Letters: N documents.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from leanmoe.core.errors import LeanMoeError

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Losses:
    """Next-token loss (negative log-likelihood, nats), summed per document."""

    names: tuple[str, ...]
    loss_N: Floats
    tokens_N: Counts
    """Tokens that were predicted, per document."""

    @property
    def mean(self) -> float:
        """Nats per predicted token, over all documents."""
        return float(self.loss_N.sum() / self.tokens_N.sum())

    def __add__(self, other: Losses) -> Losses:
        """The same documents, other tokens of them."""
        _require_same(self.names, other.names)
        return Losses(self.names, self.loss_N + other.loss_N, self.tokens_N + other.tokens_N)

    def to_json(self) -> dict[str, Any]:
        """The sums as JSON values."""
        return {
            "names": list(self.names),
            "loss": self.loss_N.tolist(),
            "tokens": self.tokens_N.tolist(),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Losses:
        """Reads what `to_json` wrote."""
        return cls(
            tuple(value["names"]),
            np.asarray(value["loss"], dtype=np.float64),
            np.asarray(value["tokens"], dtype=np.int64),
        )


@dataclass(frozen=True)
class Divergence:
    """What changed from the full model: KL(full ‖ plan) and both losses (nats), per document."""

    kl_N: Floats
    plan: Losses
    full: Losses

    @property
    def mean_kl(self) -> float:
        """Nats per predicted token: how far the plan's next-token distribution is from the full."""
        return float(self.kl_N.sum() / self.plan.tokens_N.sum())

    @property
    def loss_difference(self) -> float:
        """Nats per predicted token that the plan loses to the full model."""
        return self.plan.mean - self.full.mean

    def __add__(self, other: Divergence) -> Divergence:
        """The same documents, other tokens of them."""
        return Divergence(self.kl_N + other.kl_N, self.plan + other.plan, self.full + other.full)


def require_paired(first: Losses, second: Losses) -> None:
    """Raises LeanMoeError unless both are sums over the same tokens of the same documents."""
    _require_same(first.names, second.names)
    if different := np.flatnonzero(first.tokens_N != second.tokens_N).tolist():
        n = different[0]
        raise LeanMoeError(
            f"losses are not paired: document {first.names[n]!r} has {first.tokens_N[n]} predicted "
            f"tokens in one and {second.tokens_N[n]} in the other"
        )


def _require_same(first: tuple[str, ...], second: tuple[str, ...]) -> None:
    if first != second:
        raise LeanMoeError(
            f"losses are not paired: {len(first)} documents in one, {len(second)} in the other, "
            "or others in another order; measure both on the same windows"
        )
