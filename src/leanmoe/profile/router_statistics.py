"""What one MoE layer's router chose, counted chunk by chunk so that nothing else is kept.

Letters: T tokens in a chunk, E experts, K slots a token (top-k), Q quantiles.
"""

from __future__ import annotations

import torch
from torch import Tensor

from leanmoe.models.families import Router
from leanmoe.profile.saved import QUANTILES, LayerCounts
from leanmoe.routing import score

BINS = 1000
"""Of the histograms that quantiles are read from: a quantile is right to 1 / BINS."""


class LayerStatistics:
    """Running counts for one layer."""

    def __init__(self, router: Router, experts: int, top_k: int, bias_E: Tensor | None) -> None:
        self._router, self._top_k, self._bias_E = router, top_k, bias_E
        self._tokens = 0
        self._use_E = torch.zeros(experts, dtype=torch.int64)
        self._gate_E = torch.zeros(experts, dtype=torch.float64)
        self._together_EE = torch.zeros((experts, experts), dtype=torch.int64)
        self._mass_K = torch.zeros(top_k, dtype=torch.float64)
        self._histogram_KB = torch.zeros((top_k, BINS), dtype=torch.int64)

    @torch.inference_mode()
    def add(self, logits_TE: Tensor) -> None:
        """Counts what the model's own router makes of these logits; no padding among them."""
        scores = score(logits_TE, self._router, self._bias_E)
        ids_TK = scores.ranking_STE.topk(self._top_k, dim=-1).indices
        gates_TK = scores.gates_STE.gather(-1, ids_TK).double()
        if self._router.scoring == "softmax_after_top_k":
            gates_TK = gates_TK.softmax(-1)
        experts = logits_TE.shape[-1]
        ids_R = ids_TK.reshape(-1)
        self._tokens += len(logits_TE)
        self._use_E += torch.bincount(ids_R, minlength=experts).cpu()
        self._gate_E += torch.bincount(ids_R, gates_TK.reshape(-1), minlength=experts).cpu()
        # In float32: exact, since a chunk has fewer than 2^24 tokens, and the product is fast.
        chosen_TE = torch.zeros(logits_TE.shape, device=ids_TK.device).scatter_(1, ids_TK, 1.0)
        self._together_EE += (chosen_TE.T @ chosen_TE).long().cpu()
        self._add_mass(gates_TK)

    def _add_mass(self, gates_TK: Tensor) -> None:
        """What share of a token's gates its best j carry, in the order the model ranks them."""
        share_TK = gates_TK.cumsum(-1) / gates_TK.sum(-1, keepdim=True)
        self._mass_K += share_TK.sum(0).cpu()
        bin_TK = (share_TK * BINS).ceil().long().clamp(1, BINS) - 1
        place_TK = bin_TK + BINS * torch.arange(self._top_k, device=bin_TK.device)
        counts = torch.bincount(place_TK.reshape(-1), minlength=self._top_k * BINS)
        self._histogram_KB += counts.view(self._top_k, BINS).cpu()

    def result(self) -> LayerCounts:
        """The counts so far, as numpy arrays."""
        below_KB = self._histogram_KB.cumsum(-1).double() / max(self._tokens, 1)
        quantiles_QK = torch.stack(
            [((below_KB < quantile).sum(-1).double() + 1) / BINS for quantile in QUANTILES]
        ).clamp(max=1.0)
        return LayerCounts(
            tokens=self._tokens,
            use_E=self._use_E.numpy(),
            gate_E=(self._gate_E / self._use_E.clamp(min=1)).numpy(),
            together_EE=self._together_EE.numpy(),
            mass_K=(self._mass_K / max(self._tokens, 1)).numpy(),
            mass_quantiles_QK=quantiles_QK.numpy(),
        )
