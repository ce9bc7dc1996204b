"""Random expert layers, and the plainest way to compute them: one slot after the other, float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from leanmoe.kernels import ExpertWeights, Gate


def random_layer(
    experts: int = 6,
    hidden: int = 40,
    width: int = 24,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    *,
    transposed: bool = False,
    concatenated: bool = True,
    gated: bool = True,
    biased: bool = False,
    gate: Gate | None = None,
) -> ExpertWeights:
    """A layer whose outputs are of the order of 1."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    both = 2 * width if gated else width
    gate_up = draw(experts, both, hidden) / hidden**0.5
    down = draw(experts, hidden, width) / width**0.5
    if transposed:
        gate_up, down = gate_up.transpose(1, 2).contiguous(), down.transpose(1, 2).contiguous()
    return ExpertWeights(
        gate_up.to(dtype),
        down.to(dtype),
        draw(experts, both).to(dtype) if biased else None,
        draw(experts, hidden).to(dtype) if biased else None,
        is_transposed=transposed,
        is_concatenated=concatenated,
        is_gated=gated,
        gate=gate or Gate(),
    )


def random_call(
    weights: ExpertWeights, tokens: int, slots: int, seed: int = 0, skipped: float = 0.2
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, ids (about this share of them skipped) and routing weights."""
    generator = torch.Generator().manual_seed(seed)
    hidden_TD = torch.randn(tokens, weights.hidden, generator=generator)
    ids_TK = torch.randint(weights.experts, (tokens, slots), generator=generator)
    ids_TK[torch.rand(tokens, slots, generator=generator) < skipped] = weights.experts
    return hidden_TD, ids_TK, torch.rand(tokens, slots, generator=generator)


def slot_by_slot(
    hidden_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, weights: ExpertWeights
) -> Tensor:
    """The definition, in float64."""
    wide = in_float64(weights)
    out_TD = torch.zeros(hidden_TD.shape, dtype=torch.float64)
    for token, ids in enumerate(ids_TK.tolist()):
        for slot, expert in enumerate(ids):
            if expert == weights.experts:
                continue
            up, down = wide.gate_up[expert], wide.down[expert]
            if weights.is_transposed:
                up, down = up.T, down.T
            both = up @ hidden_TD[token].double()
            if wide.gate_up_bias is not None:
                both = both + wide.gate_up_bias[expert]
            row = down @ _narrowed(both, weights)
            if wide.down_bias is not None:
                row = row + wide.down_bias[expert]
            out_TD[token] += weights_TK[token, slot].double() * row
    return out_TD


def in_float64(weights: ExpertWeights) -> ExpertWeights:
    """The same layer with every tensor in float64."""
    names = ("gate_up", "down", "gate_up_bias", "down_bias")
    tensors = {name: getattr(weights, name) for name in names}
    wide: dict[str, Any] = {k: None if t is None else t.double() for k, t in tensors.items()}
    return replace(weights, **wide)


def _narrowed(both: Tensor, weights: ExpertWeights) -> Tensor:
    gate = weights.gate
    assert isinstance(gate, Gate)
    half = weights.width
    if not weights.is_gated:
        return _activation(gate, both)
    first, second = both[:half], both[half:]
    if not weights.is_concatenated:
        first, second = both[0::2], both[1::2]
    if gate.limit is not None:
        first = torch.minimum(first, torch.tensor(gate.limit))
        second = torch.maximum(
            torch.minimum(second, torch.tensor(gate.limit)), -torch.tensor(gate.limit)
        )
    return _activation(gate, first) * (second + gate.up_offset)


def _activation(gate: Gate, x: Tensor) -> Tensor:
    if gate.activation == "silu":
        return x / (1 + torch.exp(-gate.alpha * x))
    if gate.activation == "gelu":
        return 0.5 * x * (1 + torch.erf(x / 2**0.5))
    if gate.activation == "gelu_tanh":
        return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))
    positive = x.clamp(min=0)
    return positive if gate.activation == "relu" else positive**2
