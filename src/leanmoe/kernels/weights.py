"""What the routed experts of one MoE layer are: their weights, how they lie, and their gate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from leanmoe.core.errors import LeanMoeError

Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda gate: functional.gelu(gate, approximate="tanh"),
    "relu": functional.relu,
    "relu2": lambda gate: functional.relu(gate).square(),
}


@dataclass(frozen=True)
class Gate:
    """The function between the two products: activation(gate) * (up + up_offset).

    With `limit`, gate is clamped from above and up from both sides first. `alpha` is for silu
    alone: gate * sigmoid(alpha * gate).
    """

    activation: Activation = "silu"
    limit: float | None = None
    alpha: float = 1.0
    up_offset: float = 0.0

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise LeanMoeError(
                f"gate activation is {self.activation!r}: it must be one of "
                f"{', '.join(ACTIVATIONS)}"
            )
        if self.limit is not None and not self.limit > 0:
            raise LeanMoeError(f"gate limit is {self.limit}: it must be above 0")
        if self.alpha != 1.0 and self.activation != "silu":
            raise LeanMoeError(
                f"gate alpha is {self.alpha} with {self.activation!r}: only silu has an alpha"
            )

    @classmethod
    def gpt_oss(cls, limit: float = 7.0, alpha: float = 1.702) -> Gate:
        """The clamped SwiGLU of gpt-oss (its model card, arXiv 2508.10925)."""
        return cls("silu", limit=limit, alpha=alpha, up_offset=1.0)

    def combine(self, gate_XM: Tensor, up_XM: Tensor) -> Tensor:
        """What the down projection is applied to, (X,M)."""
        if self.limit is not None:
            gate_XM = gate_XM.clamp(max=self.limit)
            up_XM = up_XM.clamp(min=-self.limit, max=self.limit)
        if self.up_offset:
            up_XM = up_XM + self.up_offset
        return self.activate(gate_XM) * up_XM

    def activate(self, gate_XM: Tensor) -> Tensor:
        """The activation alone: what experts without an up projection use."""
        if self.alpha != 1.0:
            return gate_XM * torch.sigmoid(gate_XM * self.alpha)
        return ACTIVATIONS[self.activation](gate_XM)


SCALE_BLOCK = 128
"""Rows and columns of fp8 weights that share a scale (DeepSeek-V3 report, section 3.3.2)."""


def _blocks(experts: int, rows: int, columns: int) -> tuple[int, int, int]:
    return (experts, -(-rows // SCALE_BLOCK), -(-columns // SCALE_BLOCK))


@dataclass(frozen=True, eq=False)
class ExpertWeights:
    """The routed experts of one MoE layer.

    Raises LeanMoeError when the shapes do not fit each other or the layout.
    """

    gate_up: Tensor
    """(E,2M,D), or (E,D,2M) if `is_transposed`. Without a gate M instead of 2M: up alone."""
    down: Tensor
    """(E,D,M), or (E,M,D) if `is_transposed`."""
    gate_up_bias: Tensor | None = None
    """(E,2M)."""
    down_bias: Tensor | None = None
    """(E,D)."""
    is_transposed: bool = False
    is_concatenated: bool = True
    """gate_up's 2M are [gate; up]; otherwise interleaved: gate 0, up 0, gate 1, up 1, ..."""
    is_gated: bool = True
    gate: Gate | Callable[[Tensor], Tensor] = field(default_factory=Gate)
    """A `Gate`, or any function from the first product (X,2M), in its own layout, to (X,M)."""
    after: Callable[[Tensor], Tensor] | None = None
    """Applied to each row of the second product (X,D) before the routing weight, if set."""
    gate_up_scale: Tensor | None = None
    """(E, 2M/128, D/128), rounded up: what each 128 x 128 block of fp8 weights is multiplied by."""
    down_scale: Tensor | None = None
    """(E, D/128, M/128), rounded up."""

    def __post_init__(self) -> None:
        for name, weight in (("gate_up", self.gate_up), ("down", self.down)):
            if weight.dim() != 3:
                raise LeanMoeError(
                    f"expert weight {name} has shape {tuple(weight.shape)}: it must have 3 axes"
                )
        experts, width, hidden = self.experts, self.width, self.hidden
        double = width * (2 if self.is_gated else 1)
        self._check("gate_up", self.gate_up, self._oriented(double, hidden))
        self._check("down", self.down, self._oriented(hidden, width))
        if self.gate_up_bias is not None:
            self._check("gate_up_bias", self.gate_up_bias, (experts, double))
        if self.down_bias is not None:
            self._check("down_bias", self.down_bias, (experts, hidden))
        if (self.gate_up_scale is None) != (self.down_scale is None):
            raise LeanMoeError("expert weights have one block scale of two: give both or neither")
        if self.gate_up_scale is not None and self.down_scale is not None:
            if self.is_transposed:
                raise LeanMoeError("expert weights with block scales must not be transposed")
            self._check("gate_up_scale", self.gate_up_scale, _blocks(experts, double, hidden))
            self._check("down_scale", self.down_scale, _blocks(experts, hidden, width))

    @property
    def experts(self) -> int:
        """E."""
        return self.gate_up.shape[0]

    @property
    def width(self) -> int:
        """M."""
        return self.down.shape[1 if self.is_transposed else 2]

    @property
    def hidden(self) -> int:
        """D."""
        return self.gate_up.shape[1 if self.is_transposed else 2]

    def activated(self, product_XJ: Tensor) -> Tensor:
        """The first product (X,2M) (X,M without a gate), biases added, to the (X,M) of `down`."""
        if not isinstance(self.gate, Gate):
            return self.gate(product_XJ)
        if not self.is_gated:
            return self.gate.activate(product_XJ)
        if self.is_concatenated:
            gate_XM, up_XM = product_XJ.chunk(2, dim=-1)
        else:
            gate_XM, up_XM = product_XJ[..., ::2], product_XJ[..., 1::2]
        return self.gate.combine(gate_XM, up_XM)

    def _oriented(self, rows: int, columns: int) -> tuple[int, int, int]:
        return (self.experts, *((columns, rows) if self.is_transposed else (rows, columns)))

    def _check(self, name: str, weight: Tensor, wanted: tuple[int, ...]) -> None:
        if tuple(weight.shape) != wanted:
            raise LeanMoeError(
                f"expert weight {name} has shape {tuple(weight.shape)}: "
                f"it must be {wanted} beside the others"
            )
