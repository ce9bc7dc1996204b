"""What a plan really did: tokens, slots and distinct experts, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from leanmoe.routing import count_distinct, count_slots


@dataclass
class RoutingCounts:
    """Sums over the forward steps of one MoE layer."""

    steps: int = 0
    tokens: int = 0
    slots: int = 0
    distinct: float = 0.0
    over_budget_steps: int = 0

    def add(self, ids_BTK: Tensor, padding_BT: Tensor | None, experts: int) -> None:
        """Adds the steps of one call; what padding was routed to is not counted."""
        if padding_BT is not None:
            ids_BTK = ids_BTK.masked_fill(padding_BT[..., None].to(ids_BTK.device), experts)
        self.steps += ids_BTK.shape[0]
        padded = 0 if padding_BT is None else int(padding_BT.sum())
        self.tokens += ids_BTK.shape[0] * ids_BTK.shape[1] - padded
        self.slots += int(count_slots(ids_BTK, experts).sum())
        self.distinct += float(count_distinct(ids_BTK, experts).sum())

    @property
    def slots_per_token(self) -> float:
        """Mean experts a token used."""
        return self.slots / max(self.tokens, 1)

    @property
    def distinct_per_step(self) -> float:
        """Mean distinct experts that a step activated."""
        return self.distinct / max(self.steps, 1)

    def to_json(self) -> dict[str, Any]:
        """The means, and how often a budget could not be kept."""
        return {
            "tokens": self.tokens,
            "slots": self.slots_per_token,
            "distinct": self.distinct_per_step,
            "over_budget_steps": self.over_budget_steps,
        }
