"""AdamW on float32 masters of bf16 weights, and the warm-up, stable, decay schedule."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class OptimiserSettings:
    """AdamW and its schedule by token count."""

    learning_rate: float = 2.5e-3
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.1
    """On everything with two or more dimensions."""
    clip: float = 1.0
    """Largest global gradient norm."""
    warmup_tokens: int = 20_000_000
    decay_share: float = 0.35
    """The last share of all tokens, over which the rate falls linearly."""
    final_share: float = 0.02
    """Of the learning rate, at the end."""


def rate_at(tokens: int, total: int, settings: OptimiserSettings) -> float:
    """The learning rate after `tokens` of `total`: linear up, flat, linear down."""
    warm = min(1.0, (tokens + 1) / max(1, min(settings.warmup_tokens, total // 4)))
    decay_tokens = max(1.0, settings.decay_share * total)
    left = min(1.0, max(0.0, (total - tokens) / decay_tokens))
    fall = settings.final_share + (1 - settings.final_share) * left
    return settings.learning_rate * warm * fall


class MasterAdamW:
    """Keeps float32 masters of `weights`, steps them with AdamW, copies the result back."""

    def __init__(self, named: dict[str, Tensor], settings: OptimiserSettings) -> None:
        self.settings = settings
        self.names = list(named)
        self.weights = list(named.values())
        self.masters = [weight.detach().float().clone() for weight in self.weights]
        self.grads = [torch.zeros_like(master) for master in self.masters]
        for master, grad in zip(self.masters, self.grads, strict=True):
            master.requires_grad_(True)
            master.grad = grad
        decayed = [m for m in self.masters if m.ndim >= 2]
        plain = [m for m in self.masters if m.ndim < 2]
        groups = [{"params": decayed, "weight_decay": settings.weight_decay}]
        if plain:
            groups.append({"params": plain, "weight_decay": 0.0})
        self.adam = torch.optim.AdamW(
            groups, lr=0.0, betas=(settings.beta1, settings.beta2), eps=1e-10, fused=True
        )
        # Filled here and not by the first step, so that a run stopped before it can be saved.
        for master in self.masters:
            self.adam.state[master] = {
                "step": torch.zeros((), device=master.device),
                "exp_avg": torch.zeros_like(master),
                "exp_avg_sq": torch.zeros_like(master),
            }

    @torch.no_grad()
    def step(self, rate: float) -> Tensor:
        """One update from the weights' gradients, which it frees; returns their norm (0-d)."""
        fresh = [weight.grad for weight in self.weights if weight.grad is not None]
        torch._foreach_copy_(self.grads, fresh)
        for weight in self.weights:
            weight.grad = None
        norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(self.grads)))
        torch._foreach_mul_(self.grads, torch.clamp(self.settings.clip / (norm + 1e-6), max=1.0))
        for group in self.adam.param_groups:
            group["lr"] = rate
        self.adam.step()
        self.copy_back()
        return norm

    @torch.no_grad()
    def copy_back(self) -> None:
        """weights <- masters, rounded to the weights' own type."""
        torch._foreach_copy_(self.weights, self.masters)

    def state(self) -> dict[str, Tensor]:
        """Masters and moments by name, to be saved; `step` is the same for all."""
        tensors: dict[str, Tensor] = {}
        for name, master in zip(self.names, self.masters, strict=True):
            moments = self.adam.state[master]
            tensors[f"master.{name}"] = master.detach()
            tensors[f"exp_avg.{name}"] = moments["exp_avg"]
            tensors[f"exp_avg_sq.{name}"] = moments["exp_avg_sq"]
            tensors[f"adam_step.{name}"] = moments["step"]
        return tensors

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Takes what `state` gave, and sets the weights from the masters."""
        for name, master in zip(self.names, self.masters, strict=True):
            master.copy_(tensors[f"master.{name}"])
            self.adam.state[master] = {
                key: tensors[f"{kind}.{name}"].to(master.device, torch.float32).clone()
                for kind, key in (
                    ("exp_avg", "exp_avg"),
                    ("exp_avg_sq", "exp_avg_sq"),
                    ("adam_step", "step"),
                )
            }
        self.copy_back()
