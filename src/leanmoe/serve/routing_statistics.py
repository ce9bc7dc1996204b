"""What the last step ran, read from its own routing; nothing is computed until somebody asks.

Letters: T tokens (rows of a step), K slots of a token.

A step's ids stay where its routing wrote them: they are only held on to, so that a captured graph
leaves them alone. The first layer adds one small launch that says which step was last.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from leanmoe.runtime.counts import RoutingCounts

EAGER = 0
"""The key of a step that no graph captured; captured ones have the number of their rows."""


class StepSample(NamedTuple):
    """One layer's routing in the last step of its size."""

    ids_TK: Tensor
    weights_TK: Tensor
    padding_T: Tensor | None


@dataclass(frozen=True)
class StepReport:
    """What the last step ran."""

    rows: int
    is_captured: bool
    layers: tuple[RoutingCounts | None, ...]
    """One for each MoE layer; None for a layer that this process does not run."""
    by_rule_row: tuple[dict[int, RoutingCounts], ...]
    """The same for the tokens of each rule row; empty where all are under one rule."""

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values: per layer its tokens, distinct experts and experts a token."""
        layers: list[dict[str, Any] | None] = []
        for counts, parts in zip(self.layers, self.by_rule_row, strict=True):
            layer = None if counts is None else _counts_json(counts)
            if layer is not None and parts:
                layer["by_rule_row"] = {str(row): _counts_json(one) for row, one in parts.items()}
            layers.append(layer)
        return {"rows": self.rows, "is_captured": self.is_captured, "layers": layers}


def _counts_json(counts: RoutingCounts) -> dict[str, Any]:
    return {
        "tokens": counts.tokens,
        "distinct": int(counts.distinct_per_step),
        "activated": counts.slots_per_token,
    }


class RoutingStatistics:
    """Holds on to the routing of the last steps of a model's layers, one for each size of step."""

    def __init__(self, layers: int, experts: int) -> None:
        """The model has so many MoE layers, and so many experts in each."""
        self._experts = experts
        self._steps: list[dict[int, StepSample]] = [{} for _ in range(layers)]
        self.rule_rows: Callable[[int], Tensor] | None = None
        """Gives the rule rows [T] of the last step's so many rows; None where all are alike."""
        self._last_1: Tensor | None = None
        self._first: int | None = None

    def note(
        self, layer: int, ids_TK: Tensor, weights_TK: Tensor, padding_T: Tensor | None
    ) -> None:
        """Keeps what a layer chose in the step that runs or is captured."""
        is_captured = ids_TK.is_cuda and torch.cuda.is_current_stream_capturing()
        key = ids_TK.shape[0] if is_captured else EAGER
        self._steps[layer][key] = StepSample(ids_TK, weights_TK, padding_T)
        if self._first is None:
            self._first = layer
        if layer == self._first:
            if self._last_1 is None:
                with torch.inference_mode(False):
                    self._last_1 = torch.zeros(1, dtype=torch.int32, device=ids_TK.device)
            self._last_1.fill_(key)

    def read(self) -> StepReport:
        """What the last step ran; waits for the device."""
        key = EAGER if self._last_1 is None else int(self._last_1)
        samples = [steps.get(key) for steps in self._steps]
        rows = next((sample.ids_TK.shape[0] for sample in samples if sample is not None), 0)
        rows_T = None if self.rule_rows is None or not rows else self.rule_rows(rows).cpu()
        counted = [self._count(sample, rows_T) for sample in samples]
        wholes, parts = zip(*counted, strict=True)
        return StepReport(rows, key != EAGER, wholes, parts)

    def _count(
        self, sample: StepSample | None, rows_T: Tensor | None
    ) -> tuple[RoutingCounts | None, dict[int, RoutingCounts]]:
        """A step's counts, and those of each rule row; a slot of weight 0 is skipped.

        A row that uses no expert is no token, but for one of a rule that may allow none.
        """
        if sample is None:
            return None, {}
        is_used_TK = sample.weights_TK.cpu() != 0
        if sample.padding_T is not None:
            is_used_TK &= ~sample.padding_T.cpu().unsqueeze(-1)
        ids_TK = sample.ids_TK.cpu().long().masked_fill(~is_used_TK, self._experts)
        is_token_T = is_used_TK.any(dim=-1)
        parts: dict[int, RoutingCounts] = {}
        if rows_T is not None and len(rows_T) == len(is_token_T):
            is_token_T |= rows_T > 0
            for row in rows_T[is_token_T].unique().tolist():
                parts[row] = self._sum(ids_TK, is_token_T & (rows_T == row))
        return self._sum(ids_TK, is_token_T), parts

    def _sum(self, ids_TK: Tensor, is_token_T: Tensor) -> RoutingCounts:
        counts = RoutingCounts()
        counts.add(ids_TK.unsqueeze(0), ~is_token_T.unsqueeze(0), self._experts)
        return counts
