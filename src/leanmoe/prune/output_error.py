"""The criterion `output-error`: experts go one by one, each time the one that is missed least.

Letters: T tokens, K slots of a token, E experts, D hidden width.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from leanmoe.core.progress import bar
from leanmoe.kernels.dispatch import fast_route
from leanmoe.models.routers import Router
from leanmoe.plan import Rule
from leanmoe.runtime import find_layers, record, shape_of
from leanmoe.runtime.model import MoELayer
from leanmoe.scoring.divergence import hidden_of
from leanmoe.scoring.windows import Windows

Scores = NDArray[np.float64]
SAMPLE_TOKENS = 256
"""Tokens on which `output-error` compares a layer's output."""


def output_errors(model: Any, windows: Windows, least: int) -> Scores:
    """S_j is the step in which expert j goes, and E for the `least` that stay.

    NAEE minimises ‖y_R(t) − y(t)‖ over every subset R of Mixtral's 8 experts; with 64 or 256 that
    is not possible. Here each step removes the expert j of those that are left, R, for which
    Σ_t ‖y_{R∖j}(t) − y(t)‖² is least, where y_R is the layer's output when only R may be chosen.
    The sum is over a sample of SAMPLE_TOKENS tokens.
    """
    shape, layers = shape_of(model), find_layers(model)
    hidden: dict[int, Tensor] = {}
    logits: dict[int, Tensor] = {}
    with ExitStack() as hooks:
        for layer in layers:

            def caught(_module: Any, inputs: Any, _out: Any, number: int = layer.number) -> None:
                hidden[number] = inputs[0]

            hooks.callback(layer.experts.register_forward_hook(caught).remove)
        with record(model, logits.__setitem__):
            batch, _ = next(hidden_of(model, windows, "Sampling tokens"))
    real = batch.mask_SN.reshape(-1).nonzero().flatten()
    draw = torch.Generator().manual_seed(windows.seed)
    chosen = real[torch.randperm(len(real), generator=draw)[:SAMPLE_TOKENS]]
    with bar("Removing experts", len(layers) * (shape.experts - least), "experts") as advance:
        return np.stack(
            [
                removal_order(
                    layer,
                    shape.router,
                    shape.top_k,
                    hidden[layer.number][chosen],
                    logits[layer.number][chosen],
                    least,
                    advance,
                )
                for layer in layers
            ]
        )


@torch.inference_mode()
def removal_order(
    layer: MoELayer,
    router: Router,
    top_k: int,
    hidden_TD: Tensor,
    logits_TE: Tensor,
    least: int,
    progress: Callable[[int], None] = lambda _: None,
) -> Scores:
    """Scores [E]: the later an expert goes, the higher; the last `least` are not told apart."""
    bias_E = layer.ranking_bias(router)
    outputs_TED = layer.all_outputs(hidden_TD).float()
    state = _Layer(outputs_TED, logits_TE, router, top_k, bias_E)
    scores_E = np.full(logits_TE.shape[1], float(logits_TE.shape[1]))
    kept = list(range(logits_TE.shape[1]))
    for step in range(len(kept) - least):
        gone = min(kept, key=lambda expert: (state.error_without(expert, kept), expert))
        kept.remove(gone)
        state.settle(kept)
        scores_E[gone] = step
        progress(1)
    return scores_E


class _Layer:
    """A layer's output on the sample with the experts that are left, and how far it is off."""

    def __init__(
        self, outputs_TED: Tensor, logits_TE: Tensor, router: Router, top_k: int, bias_E: Any
    ) -> None:
        self._outputs, self._logits, self._bias = outputs_TED, logits_TE, bias_E
        self._router, self._top_k = router, top_k
        everyone = torch.arange(len(logits_TE), device=logits_TE.device)
        self._ids, self._full = self._run(everyone, None)
        self._error_T = torch.zeros(len(logits_TE), device=logits_TE.device)

    def error_without(self, expert: int, kept: list[int]) -> float:
        """Squared error of the layer's output if one more goes; only its tokens change."""
        rows = (self._ids == expert).any(dim=-1).nonzero().flatten()
        if not len(rows):
            return float(self._error_T.sum())
        _, out = self._run(rows, [other for other in kept if other != expert])
        changed = (out - self._full[rows]).square().sum(dim=-1)
        return float(self._error_T.sum() - self._error_T[rows].sum() + changed.sum())

    def settle(self, kept: list[int]) -> None:
        """Goes on from these experts."""
        everyone = torch.arange(len(self._logits), device=self._logits.device)
        self._ids, out = self._run(everyone, kept)
        self._error_T = (out - self._full).square().sum(dim=-1)

    def _run(self, rows: Tensor, kept: list[int] | None) -> tuple[Tensor, Tensor]:
        rule = Rule(experts=None if kept is None else tuple(kept))
        routing = fast_route(self._logits[rows], self._router, self._top_k, rule, self._bias)
        experts = self._logits.shape[1]
        used = routing.ids_BTK < experts
        ids = routing.ids_BTK.clamp(max=experts - 1)
        parts_TKD = self._outputs[rows[:, None], ids]
        weights_TK = routing.weights_BTK.float() * used
        return routing.ids_BTK, torch.einsum("tkd,tk->td", parts_TKD, weights_TK)
