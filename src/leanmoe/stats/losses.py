"""Next-token losses and divergences, summed by document. Needs no torch.

Letters: U documents.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
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
    loss_U: Floats
    tokens_U: Counts
    """Tokens that were predicted, per document."""
    sources: tuple[str, ...] = ()
    """What each document is from; without, each is a source of its own."""

    def units(self) -> Counts:
        """The number [U] of each document's source, in the order of first appearance."""
        numbers: dict[str, int] = {}
        sources = self.sources or self.names
        return np.array([numbers.setdefault(each, len(numbers)) for each in sources])

    @property
    def mean(self) -> float:
        """Nats per predicted token, over all documents."""
        return float(self.loss_U.sum() / self.tokens_U.sum())

    def __add__(self, other: Losses) -> Losses:
        """The same documents, other tokens of them."""
        _require_same(self.names, other.names)
        return replace(
            self, loss_U=self.loss_U + other.loss_U, tokens_U=self.tokens_U + other.tokens_U
        )

    def to_json(self) -> dict[str, Any]:
        """The sums as JSON values."""
        return {
            "names": list(self.names),
            "loss": self.loss_U.tolist(),
            "tokens": self.tokens_U.tolist(),
            "sources": list(self.sources),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any], where: str = "losses") -> Losses:
        """Reads what `to_json` wrote."""
        del where
        return cls(
            tuple(value["names"]),
            np.asarray(value["loss"], dtype=np.float64),
            np.asarray(value["tokens"], dtype=np.int64),
            tuple(value["sources"]),
        )


@dataclass(frozen=True)
class Divergence:
    """What changed from the full model: KL(full ‖ plan) and both losses (nats), per document."""

    kl_U: Floats
    flips_U: Floats
    """Predicted tokens whose likeliest token is another than the full model's."""
    plan: Losses
    full: Losses

    @property
    def mean_kl(self) -> float:
        """Nats per predicted token: how far the plan's next-token distribution is from the full."""
        return float(self.kl_U.sum() / self.plan.tokens_U.sum())

    @property
    def loss_difference(self) -> float:
        """Nats per predicted token that the plan loses to the full model."""
        return self.plan.mean - self.full.mean

    def __add__(self, other: Divergence) -> Divergence:
        """The same documents, other tokens of them."""
        return Divergence(
            self.kl_U + other.kl_U,
            self.flips_U + other.flips_U,
            self.plan + other.plan,
            self.full + other.full,
        )

    @property
    def flips(self) -> float:
        """The share of predicted tokens whose likeliest token changed."""
        return float(self.flips_U.sum() / self.plan.tokens_U.sum())

    def worst_tenth(self) -> float:
        """The relative increase in loss over the tenth of the documents that it is largest in."""
        scored_U = self.full.loss_U > 0
        plan_U, full_U = self.plan.loss_U[scored_U], self.full.loss_U[scored_U]
        count = max(1, round(len(full_U) / 10))
        worst = np.argsort(plan_U / full_U)[-count:]
        return float(plan_U[worst].sum() / full_U[worst].sum() - 1)

    def to_json(self) -> dict[str, Any]:
        """The sums as JSON values."""
        return {
            "kl": self.kl_U.tolist(),
            "flips": self.flips_U.tolist(),
            "plan": self.plan.to_json(),
            "full": self.full.to_json(),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any], where: str = "divergence") -> Divergence:
        """Reads what `to_json` wrote."""
        return cls(
            np.asarray(value["kl"], dtype=np.float64),
            np.asarray(value["flips"], dtype=np.float64),
            Losses.from_json(value["plan"], where),
            Losses.from_json(value["full"], where),
        )


def require_paired(first: Losses, second: Losses) -> None:
    """Raises LeanMoeError unless both are sums over the same tokens of the same documents."""
    _require_same(first.names, second.names)
    _require_same(first.sources or first.names, second.sources or second.names)
    if different := np.flatnonzero(first.tokens_U != second.tokens_U).tolist():
        n = different[0]
        raise LeanMoeError(
            f"losses are not paired: document {first.names[n]!r} has {first.tokens_U[n]} predicted "
            f"tokens in one and {second.tokens_U[n]} in the other"
        )


def _require_same(first: tuple[str, ...], second: tuple[str, ...]) -> None:
    if first != second:
        raise LeanMoeError(
            f"losses are not paired: {len(first)} documents in one, {len(second)} in the other, "
            "or others in another order; measure both on the same windows"
        )
