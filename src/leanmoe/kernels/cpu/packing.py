"""Expert weights in the order the CPU kernel reads them: one stream from front to back.

Each expert's two matrices become panels of a few vectors of columns, (i, columns) inside a panel;
gate columns come first, then up columns, each padded to whole vectors with zeros. bf16 weights
stay two bytes: a 32-bit word holds a column of one vector and the same column of the next.

Letters: E experts, M expert width, D hidden width, I inputs of a matrix, J its padded columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from leanmoe.kernels.cpu import gemm
from leanmoe.kernels.cpu.llvm_microkernel import LANES, PANEL
from leanmoe.kernels.weights import ExpertWeights

Array = NDArray[np.generic]


@dataclass(frozen=True)
class Packed:
    """One layer's packed weights."""

    gate_up: Array
    down: Array
    gate_up_bias: Array
    down_bias: Array
    is_bf16: bool
    has_bias: bool

    @property
    def bytes(self) -> int:
        """Memory the packed copy takes."""
        return sum(a.nbytes for a in (self.gate_up, self.down, self.gate_up_bias, self.down_bias))


def pack(weights: ExpertWeights) -> Packed:
    """Packs one layer. Weights that bf16 holds exactly are kept in bf16, others in float32."""
    experts, width, hidden = weights.experts, weights.width, weights.hidden
    is_bf16 = all(_fits_bf16(w) for w in (weights.gate_up, weights.down))
    inner = gemm.padded_width(width, weights.is_gated)
    columns = inner * (2 if weights.is_gated else 1)
    wide = gemm.padded_hidden(hidden)
    kind = np.uint16 if is_bf16 else np.float32
    gate_up = np.empty((experts, hidden * columns), kind)
    down = np.empty((experts, width * wide), kind)
    for expert in range(experts):
        first_IJ = torch.zeros(hidden, columns)
        for part, at in _gate_and_up(weights, inner):
            matrix = weights.gate_up[expert].detach().float()
            first_IJ[:, at : at + width] = (matrix if weights.is_transposed else matrix.T)[:, part]
        second_IJ = torch.zeros(width, wide)
        matrix = weights.down[expert].detach().float()
        second_IJ[:, :hidden] = matrix if weights.is_transposed else matrix.T
        gate_up[expert] = _panels(first_IJ, is_bf16)
        down[expert] = _panels(second_IJ, is_bf16)

    has_bias = weights.gate_up_bias is not None or weights.down_bias is not None
    gate_up_bias = torch.zeros(experts if has_bias else 1, columns)
    down_bias = torch.zeros(experts if has_bias else 1, wide)
    if weights.gate_up_bias is not None:
        for part, at in _gate_and_up(weights, inner):
            gate_up_bias[:, at : at + width] = weights.gate_up_bias.detach().float()[:, part]
    if weights.down_bias is not None:
        down_bias[:, :hidden] = weights.down_bias.detach().float()
    return Packed(gate_up, down, gate_up_bias.numpy(), down_bias.numpy(), is_bf16, has_bias)


def _gate_and_up(weights: ExpertWeights, inner: int) -> list[tuple[slice, int]]:
    """Which of gate_up's 2M are gate and up, and the padded column where each begins."""
    width = weights.width
    if not weights.is_gated:
        return [(slice(0, width), 0)]
    if weights.is_concatenated:
        return [(slice(0, width), 0), (slice(width, 2 * width), inner)]
    return [(slice(0, None, 2), 0), (slice(1, None, 2), inner)]


def _fits_bf16(weight: Tensor) -> bool:
    if weight.dtype == torch.bfloat16:
        return True
    if weight.dtype != torch.float32:
        return False
    bits = weight.detach().contiguous().view(torch.int32)
    return all(not bool((bits[expert] & 0xFFFF).any()) for expert in range(bits.shape[0]))


def _panels(matrix_IJ: Tensor, is_bf16: bool) -> Array:
    inputs, columns = matrix_IJ.shape
    vectors = matrix_IJ.view(inputs, columns // LANES, LANES)
    panels = [vectors[:, v : v + PANEL] for v in range(0, columns // LANES, PANEL)]
    if not is_bf16:
        return torch.cat([panel.reshape(-1) for panel in panels]).numpy()
    # Pairs of vectors, lane by lane: the first is the lower half of each word.
    words = [
        panel.reshape(inputs, -1, 2, LANES).transpose(2, 3).to(torch.bfloat16).reshape(-1)
        for panel in panels
    ]
    return torch.cat(words).view(torch.int16).numpy().view(np.uint16)
