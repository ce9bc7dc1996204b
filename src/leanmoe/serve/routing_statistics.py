"""What ran, read from the last step's own routing; nothing is computed until somebody asks.

Letters: T rows of a step, K slots a token, L MoE layers.

A step's ids stay where its routing wrote them: they are only held on to, so that a captured graph
leaves them alone. The first layer adds one small launch that says which step was last.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

EAGER = 0
"""The key of a step that no graph captured; captured ones have the number of their rows."""


class Step(NamedTuple):
    """One layer's routing in the last step of its size."""

    ids_TK: Tensor
    weights_TK: Tensor
    padding_T: Tensor | None


class Statistics:
    """Holds on to the last steps of a model's layers."""

    def __init__(self, layers: int) -> None:
        self._steps: list[dict[int, Step]] = [{} for _ in range(layers)]
        self._last_1: Tensor | None = None
        self._first: int | None = None

    def note(
        self, layer: int, ids_TK: Tensor, weights_TK: Tensor, padding_T: Tensor | None
    ) -> None:
        """Keeps what a layer chose in the step that runs or is captured."""
        is_captured = ids_TK.is_cuda and torch.cuda.is_current_stream_capturing()
        key = ids_TK.shape[0] if is_captured else EAGER
        self._steps[layer][key] = Step(ids_TK, weights_TK, padding_T)
        if self._first is None:
            self._first = layer
        if layer == self._first:
            if self._last_1 is None:
                with torch.inference_mode(False):
                    self._last_1 = torch.zeros(1, dtype=torch.int32, device=ids_TK.device)
            self._last_1.fill_(key)

    def read(self) -> dict[str, Any]:
        """Rows of the last step, and per layer the distinct experts and those a token activated.

        Waits for the device. `layers` has None for a layer that this process does not run.
        """
        key = EAGER if self._last_1 is None else int(self._last_1)
        layers = [_counted(steps.get(key)) for steps in self._steps]
        rows = next((found["rows"] for found in layers if found is not None), 0)
        return {"rows": rows, "is_captured": key != EAGER, "layers": layers}


def _counted(step: Step | None) -> dict[str, Any] | None:
    if step is None:
        return None
    ids_TK, weights_TK = step.ids_TK.cpu(), step.weights_TK.cpu()
    used_TK = weights_TK != 0
    if step.padding_T is not None:
        used_TK &= ~step.padding_T.cpu().unsqueeze(-1)
    tokens = int(used_TK.any(dim=-1).sum())
    return {
        "rows": ids_TK.shape[0],
        "tokens": tokens,
        "distinct": len(set(ids_TK[used_TK].tolist())),
        "activated": float(used_TK.sum() / max(tokens, 1)),
    }
