"""A model held to measured rows: how much longer than modelled they took, and between them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from copy import copy
from dataclasses import dataclass

import numpy as np

from leanmoe.models.shape import MoEShape
from leanmoe.predict.constants import KernelConstants
from leanmoe.predict.hardware.gpus import Gpu
from leanmoe.predict.kernels.features import ExpertsShape, Rows
from leanmoe.predict.kernels.tables import (
    ACTIVATION_BYTES,
    PADDED_TO,
    VERSION,
    Measured,
    is_as_if,
    measured_curve,
)
from leanmoe.predict.step.deployment import Deployment

GATHERED = ("vllm-triton", "vllm-flashinfer")
"""Kernels of an engine whose data-parallel ranks gather each other's tokens: each GPU sees all
tokens of a step and computes its own experts' rows (vLLM's `allgather_reducescatter`, its
default). Other engines are taken to send a token only to the GPUs that hold its experts."""


@dataclass(frozen=True)
class Ratios:
    """Measured over modelled time at measured tokens, by rising tokens; none are 1 everywhere."""

    points: tuple[tuple[float, float], ...] = ()
    """Tokens, ratio."""

    @classmethod
    def of(cls, points: Iterable[tuple[float, float]]) -> Ratios:
        """From (tokens, ratio) in any order."""
        return cls(tuple(sorted(points)))

    def at(self, tokens: float) -> float:
        """Between two rows, linear over the logarithm of tokens; beyond the ends, the end's."""
        if not self.points:
            return 1.0
        measured, ratios = np.array(self.points).T
        return float(np.interp(math.log(tokens), np.log(measured), ratios))


class ExpertsTime:
    """The time of one layer's experts: constants, held to measured rows of the same layer."""

    def __init__(self, model: MoEShape, deployment: Deployment, kernel: KernelConstants) -> None:
        self._gpu, self._kernel = deployment.gpu, kernel
        self.shape = ExpertsShape(
            model.hidden,
            model.expert_width / deployment.expert_tensor,
            model.experts // deployment.expert,
            model.matrices,
            model.storage.expert_bytes,
            ACTIVATION_BYTES.get(kernel.dtype, 2.0),
            PADDED_TO.get(kernel.dtype, 1),
        )
        sizes = model.hidden, model.expert_width, model.experts, model.top_k
        key = (*sizes, deployment.expert_tensor, deployment.expert)
        # The tables' rows see all tokens of a step on each GPU, as without an exchange.
        measured = (
            []
            if deployment.exchanges and kernel.kernel not in GATHERED
            else measured_curve(self._gpu.name, kernel.kernel, kernel.dtype, key)
        )
        self._held = Ratios.of((m.tokens, self._ratio(m)) for m in measured)
        self.is_held = bool(measured)
        self.origin = "modelled"
        if measured:
            self.origin = (
                f"interpolated: {len(measured)} measured rows of this layer "
                f"(aiconfigurator-core {VERSION})"
            )
        if is_as_if(model):
            self.origin += f", {model.storage.name} weights read, computed as if by bf16's kernel"
        elif kernel.dtype in ACTIVATION_BYTES and self._gpu.flops_fp8 <= self._gpu.flops:
            self.origin += f", as if {self._gpu.name} computed fp8 at its bf16 rate"

    def _ratio(self, row: Measured) -> float:
        rows = row.rows(self._kernel.kernel)
        modelled = self._kernel.seconds(row.shape(self._kernel.dtype), rows, self._gpu)
        return row.seconds / modelled if modelled > 0 else 1.0

    def on(self, gpu: Gpu) -> ExpertsTime:
        """Returns a copy with another GPU's rates."""
        other = copy(self)
        other._gpu = gpu
        return other

    def seconds(self, rows: Rows) -> float:
        """Seconds of one layer on one GPU."""
        modelled = self._kernel.seconds(self.shape, rows, self._gpu)
        return modelled * self._held.at(max(rows.tokens, 1.0))
