"""Expert load balancing: by bias where a router has one, else by a loss alone.

As in the DeepSeek-V3 report (arXiv 2412.19437, section 2.1.2) the bias moves by a fixed step toward
even load after every training step; a very small sequence-wise loss keeps single sequences from
extremes. A router without bias is balanced by the same loss over the whole batch, which leaves
experts free to specialise (arXiv 2501.11873, as Qwen3 does it).
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from leanmoe.models.routers import BIAS

BATCH_ALPHA = 1e-2
"""Factor of a balance loss that no bias helps (Switch Transformers, arXiv 2101.03961, 2.2)."""


class LoadBalancer:
    """Counts what each router chose, by forward hooks and on the device, and moves the biases."""

    def __init__(self, gates: list[nn.Module], experts: int, sequence_tokens: int) -> None:
        self.gates = gates
        self.sequence_tokens = sequence_tokens
        device = cast(Tensor, gates[0].weight).device
        self.load_LE = torch.zeros(len(gates), experts, device=device)
        """Slots each expert took since the last `update_biases`, by MoE layer."""
        self._losses: list[Tensor] = []
        self._handles = [
            gate.register_forward_hook(self._hook(layer)) for layer, gate in enumerate(gates)
        ]

    def _hook(self, layer: int) -> Any:
        def observe(gate: nn.Module, _inputs: Any, outputs: tuple[Tensor, Tensor, Tensor]) -> None:
            if not gate.training:
                return
            logits_TE, _weights_TK, ids_TK = outputs
            has_bias = hasattr(gate, BIAS)
            tokens = self.sequence_tokens if has_bias else logits_TE.shape[0]
            scores_TE = logits_TE.sigmoid() if has_bias else logits_TE.float().softmax(dim=-1)
            counts_SE, loss = balance_loss(scores_TE, ids_TK, tokens)
            self.load_LE[layer] += counts_SE.sum(dim=0)
            self._losses.append(loss)

        return observe

    def take_loss(self) -> Tensor:
        """The balance loss of the last forward pass, summed over layers."""
        loss = torch.stack(self._losses).sum()
        self._losses.clear()
        return loss

    @torch.no_grad()
    def update_biases(self, gamma: float) -> Tensor:
        """Moves the biases by gamma toward even load; returns max/mean load per layer (L)."""
        mean_L1 = self.load_LE.mean(dim=1, keepdim=True)
        steps_LE = gamma * torch.sign(mean_L1 - self.load_LE)
        for gate, step_E in zip(self.gates, steps_LE, strict=True):
            if hasattr(gate, BIAS):
                gate.e_score_correction_bias += step_E
        violation_L = self.load_LE.amax(dim=1) / mean_L1.squeeze(1)
        self.load_LE.zero_()
        return violation_L

    def close(self) -> None:
        """Removes the hooks."""
        for handle in self._handles:
            handle.remove()


def balance_loss(scores_TE: Tensor, ids_TK: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Slots per expert of each `tokens` tokens (S,E), and the balance loss before its factor.

    Equations 17 to 20 of the report: sum over experts of f x P, where f is an expert's share of
    the slots times E (1 when even) and P its mean share of the normalised scores; mean over
    sequences. 1 when perfectly even.
    """
    experts, slots = scores_TE.shape[1], ids_TK.shape[1]
    ids_SX = ids_TK.reshape(-1, tokens * slots)
    counts_SE = torch.zeros(ids_SX.shape[0], experts, device=scores_TE.device)
    counts_SE.scatter_add_(1, ids_SX, torch.ones_like(ids_SX, dtype=counts_SE.dtype))
    shares_TE = scores_TE / scores_TE.sum(dim=-1, keepdim=True)
    shares_SE = shares_TE.view(-1, tokens, experts).mean(dim=1)
    fractions_SE = counts_SE * (experts / (slots * tokens))
    return counts_SE, (fractions_SE * shares_SE).sum(dim=-1).mean()
