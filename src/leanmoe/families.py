"""How each model family's router turns logits into experts and weights: written down once.

Only what truly differs per family stands here; the sizes come from config.json (`shape.py`).
Needs no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Scoring = Literal["softmax", "sigmoid", "softmax_after_top_k"]
GroupScore = Literal["max", "top2_sum"]


@dataclass(frozen=True)
class Router:
    """How a router ranks experts and weighs the ones it picked."""

    scoring: Scoring = "softmax"
    """softmax over all experts; sigmoid of each; or softmax over the picked logits alone."""
    ranking_bias: str | None = None
    """Name of the module's bias that is added to the scores for ranking, never for weighting."""
    normalise: bool = False
    """Whether the picked gates are divided by their sum (`norm_topk_prob`)."""
    normalise_epsilon: float = 0.0
    """Added to that sum before dividing, as the family does it."""
    scaling: float = 1.0
    """Factor on the gate weights, after normalising (`routed_scaling_factor`)."""
    groups: int = 1
    """Groups the experts are divided into for group-limited routing; 1 for none."""
    groups_used: int = 1
    """Groups a token may pick experts from."""
    group_score: GroupScore = "top2_sum"
    """How a group is ranked: by its best expert (V2) or by the sum of its best two (V3)."""
