"""CPU experts: rows sorted by expert, one fused pass over the experts that are awake.

Shapes: T tokens, K slots a token, E experts, D hidden width.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import MutableMapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from leanmoe.errors import LeanMoeError
from leanmoe.kernels.reference import check_call, refuse_ids
from leanmoe.kernels.threads import find_team
from leanmoe.kernels.weights import ExpertWeights, Gate
from leanmoe.kernels.work import add_work

FLOATS = (torch.float32, torch.bfloat16, torch.float16)

_kernels: MutableMapping[Tensor, Kernel] = WeakTensorKeyDictionary()
"""Prepared layers by their gate_up tensor: preparing the same layer again costs nothing."""
_preparing = threading.Lock()


def why_not_cpu(weights: ExpertWeights) -> str | None:
    """Why `experts_cpu` cannot compute these weights; None if it can."""
    if weights.gate_up.device.type != "cpu":
        return f"the weights are on {weights.gate_up.device}"
    if weights.gate_up.dtype not in FLOATS or weights.down.dtype not in FLOATS:
        return f"no kernel for {weights.gate_up.dtype} weights"
    if not isinstance(weights.gate, Gate):
        return "the gate is a function of the model's own"
    if weights.after is not None:
        return "the experts end in a function of the model's own"
    return None


def experts_cpu(
    hidden_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, weights: ExpertWeights
) -> Tensor:
    """Each token's weighted sum over its experts, (T,D), as `experts_reference` gives it.

    Time falls with skipped slots and with distinct experts. Computes and adds up in float32
    whatever the dtypes. Runs on torch's own threads (`torch.set_num_threads`) and gives the same
    bits every time with the same number of them. Raises LeanMoeError for what it cannot compute.
    """
    check_call(hidden_TD, ids_TK, weights_TK, weights)
    if hidden_TD.dtype not in FLOATS:
        raise LeanMoeError(
            f"experts_cpu got {hidden_TD.dtype} hidden states: it computes in float32"
        )
    kernel = prepare(weights)
    hidden = hidden_TD.to(torch.float32).contiguous()
    ids, gates = ids_TK.to(torch.int64).contiguous(), weights_TK.to(torch.float32).contiguous()
    out = torch.empty_like(hidden)
    done = kernel(hidden, ids, gates, out)
    if done < 0:
        refuse_ids(int(ids.min()), int(ids.max()), weights.experts)
    add_work(done >> 32, done & 0xFFFFFFFF)
    return out.to(hidden_TD.dtype)


def prepare(weights: ExpertWeights) -> Kernel:
    """Packs the weights and compiles the program, both once; again when the weights changed."""
    stamp = _stamp(weights)
    kernel: Kernel | None = weights.__dict__.get("_kernel")
    if kernel is not None and kernel.stamp == stamp:
        return kernel
    with _preparing:
        kernel = _kernels.get(weights.gate_up)
        if kernel is None or kernel.stamp != stamp:
            if reason := why_not_cpu(weights):
                raise LeanMoeError(f"experts_cpu cannot compute these experts: {reason}")
            kernel = Kernel(weights, stamp)
            _kernels[weights.gate_up] = kernel
    weights.__dict__["_kernel"] = kernel
    return kernel


def _stamp(weights: ExpertWeights) -> tuple[Any, ...]:
    """Changes when a weight is written to or replaced."""
    tensors = (weights.gate_up, weights.down)
    return (
        *(t.data_ptr() for t in tensors),
        *(0 if t.is_inference() else t._version for t in tensors),
        weights.gate,
        weights.is_concatenated,
    )


class Kernel:
    """One layer's packed weights with the compiled program."""

    def __init__(self, weights: ExpertWeights, stamp: tuple[Any, ...]) -> None:
        from leanmoe.kernels import cpu_program as program
        from leanmoe.kernels.packing import pack

        gate = weights.gate
        assert isinstance(gate, Gate)
        self.stamp = stamp
        self.packed = packed = pack(weights)
        limit = np.inf if gate.limit is None else gate.limit
        self._numbers = np.array([limit, gate.alpha, gate.up_offset], np.float32)
        self._experts = weights.experts
        self._sizes = (weights.hidden, weights.width)
        self._scratch_bytes = program.scratch_bytes
        arrays = (packed.gate_up, packed.down, packed.gate_up_bias, packed.down_bias)
        self._addresses = tuple(a.ctypes.data for a in (*arrays, self._numbers))
        activation = ("silu", "gelu", "gelu_tanh", "relu", "relu2").index(gate.activation)
        self._flags = (packed.has_bias, packed.is_bf16, weights.is_gated, activation)
        team = find_team()
        self._team = (team.parallel, team.thread_number, team.barrier) if team else (0, 0, 0)
        self._has_team = team is not None
        self._worker = program.worker.address
        self._run = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_char_p)(program.run.address)
        self._pack_fields = struct.Struct(f"={program.FIELDS}q").pack

    def describe(self) -> str:
        """One line: what runs, on how many threads, with how much memory for packed weights."""
        kind = "bfloat16" if self.packed.is_bf16 else "float32"
        threads = torch.get_num_threads() if self._has_team else 1
        return (
            f"fused kernel on {threads} thread{'s' if threads > 1 else ''}, "
            f"{self.packed.bytes / 1e6:.1f} MB of packed {kind} weights a layer"
        )

    def __call__(self, hidden_TD: Tensor, ids_TK: Tensor, gates_TK: Tensor, out_TD: Tensor) -> int:
        """Fills `out_TD`; returns what `run` does. All contiguous, float32 and int64."""
        tokens, slots = ids_TK.shape
        threads = torch.get_num_threads() if self._has_team else 1
        size = self._scratch_bytes(tokens, slots, self._experts, *self._sizes, threads)
        scratch = torch.empty(size, dtype=torch.uint8)
        fields = self._pack_fields(
            hidden_TD.data_ptr(),
            ids_TK.data_ptr(),
            gates_TK.data_ptr(),
            out_TD.data_ptr(),
            *self._addresses,
            scratch.data_ptr(),
            tokens,
            slots,
            self._experts,
            *self._sizes,
            *self._flags,
            threads,
            *self._team,
            self._worker,
            0,
            0,
        )
        done: int = self._run(fields)
        return done
