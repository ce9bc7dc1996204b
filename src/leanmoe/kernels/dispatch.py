"""Which implementation computes the experts of a layer, said by name and with the reason."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple

import psutil
import torch
from torch import Tensor

from leanmoe.kernels.cpu.experts import experts_cpu, prepare, why_not_cpu
from leanmoe.kernels.reference import experts_reference
from leanmoe.kernels.triton.experts import experts_gpu, why_not_gpu
from leanmoe.kernels.triton.tuned_tiles import describe
from leanmoe.kernels.weights import ExpertWeights

Experts = Callable[[Tensor, Tensor, Tensor, ExpertWeights], Tensor]

SHARE_OF_FREE_MEMORY = 0.5
"""A layer's packed copy may take this share of what is free; layers are chosen one by one."""


class Choice(NamedTuple):
    """What will run: `function(hidden_TD, ids_TK, weights_TK, weights) -> out_TD`."""

    name: str
    function: Experts
    reason: str


def choose_experts(weights: ExpertWeights, device: torch.device | str) -> Choice:
    """The fastest implementation for these weights on this device, and why it is that one.

    Prepares it too (packs the weights, compiles), so that the first call is as fast as the rest.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        return _choose_gpu(weights)
    if kind != "cpu":
        return Choice("reference", experts_reference, f"no kernel for {kind}")
    if reason := why_not_cpu(weights):
        return Choice("reference", experts_reference, reason)
    if reason := _lacks_memory(weights):
        return Choice("reference", experts_reference, reason)
    return Choice("cpu", experts_cpu, prepare(weights).describe())


def _choose_gpu(weights: ExpertWeights) -> Choice:
    if find_spec("triton") is None:
        return Choice("reference", experts_reference, "triton is not installed")
    if reason := why_not_gpu(weights):
        return Choice("reference", experts_reference, reason)
    return Choice("gpu", experts_gpu, describe(weights))


def _lacks_memory(weights: ExpertWeights) -> str | None:
    needed = sum(w.numel() * w.element_size() for w in (weights.gate_up, weights.down))
    free = psutil.virtual_memory().available
    if needed <= free * SHARE_OF_FREE_MEMORY:
        return None
    return (
        f"the kernel's packed copy of a layer needs {needed / 1e9:.1f} GB "
        f"and {free / 1e9:.1f} GB are free"
    )
