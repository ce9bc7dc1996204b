"""CPU experts: rows sorted by expert, one fused pass over the active experts."""

from __future__ import annotations

import ctypes
import functools
import struct
import threading
from collections.abc import MutableMapping

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from leanmoe.core.errors import LeanMoeError
from leanmoe.kernels.cpu.threads import find_team
from leanmoe.kernels.reference import check_call, refuse_ids
from leanmoe.kernels.weights import ExpertWeights, Gate
from leanmoe.kernels.work import add_work

FLOATS = (torch.float32, torch.bfloat16, torch.float16)

_kernels: MutableMapping[Tensor, Kernel] = WeakTensorKeyDictionary()
"""Prepared layers by their gate_up tensor: preparing the same layer again costs nothing."""
_preparing = threading.Lock()


def experts_cpu_unsupported(weights: ExpertWeights) -> str | None:
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
    ids = _plain(ids_TK, torch.int64)
    out, done = kernel(_plain(hidden_TD, torch.float32), ids, _plain(weights_TK, torch.float32))
    if done < 0:
        refuse_ids(int(ids.min()), int(ids.max()), weights.experts)
    add_work(done >> 32, done & 0xFFFFFFFF)
    return out if out.dtype is hidden_TD.dtype else out.to(hidden_TD.dtype)


def _plain(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Contiguous and of that dtype; most are, and asking is cheaper than converting."""
    if tensor.dtype is dtype and tensor.is_contiguous():
        return tensor
    return tensor.to(dtype).contiguous()


def prepare(weights: ExpertWeights) -> Kernel:
    """Packs the weights and compiles the program, both once; again when the weights changed."""
    version = _version(weights)
    kernel: Kernel | None = weights.__dict__.get("_kernel")
    if kernel is not None and kernel.version == version:
        return kernel
    with _preparing:
        layout = (weights.gate, weights.is_gated, weights.is_concatenated, weights.is_transposed)
        kernel = _kernels.get(weights.gate_up)
        if kernel is None or kernel.version != version or kernel.layout != layout:
            if reason := experts_cpu_unsupported(weights):
                raise LeanMoeError(f"experts_cpu cannot compute these experts: {reason}")
            kernel = Kernel(weights, version, layout)
            _kernels[weights.gate_up] = kernel
    weights.__dict__["_kernel"] = kernel
    return kernel


def _version(weights: ExpertWeights) -> tuple[int, ...]:
    """Changes when a weight or bias is written to or moved."""
    version = []
    for tensor in (weights.gate_up, weights.down, weights.gate_up_bias, weights.down_bias):
        if tensor is not None:
            # Tensors made in inference mode do not count their versions.
            version.append(0 if tensor.is_inference() else tensor._version)
            version.append(tensor.data_ptr())
    return tuple(version)


class Kernel:
    """One layer's packed weights with the compiled program."""

    def __init__(
        self, weights: ExpertWeights, version: tuple[int, ...], layout: tuple[object, ...]
    ) -> None:
        # Imported here: numba alone takes half a second, and reading a config needs none of it.
        from leanmoe.kernels.cpu import experts_program as program
        from leanmoe.kernels.cpu.gemm import ACTIVATIONS
        from leanmoe.kernels.cpu.packing import pack

        gate = weights.gate
        assert isinstance(gate, Gate)
        self.version, self.layout = version, layout
        self.packed = packed = pack(weights)
        limit = np.inf if gate.limit is None else gate.limit
        self._numbers = np.array([limit, gate.alpha, gate.up_offset], np.float32)
        arrays = (packed.gate_up, packed.down, packed.gate_up_bias, packed.down_bias)
        self._addresses = tuple(a.ctypes.data for a in (*arrays, self._numbers))
        self._sizes = (weights.experts, weights.hidden, weights.width)
        activation = ACTIVATIONS.index(gate.activation)
        self._flags = (packed.has_bias, packed.is_bf16, weights.is_gated, activation)
        team = find_team()
        self._team = (team.parallel, team.thread_number) if team else (0, 0)
        self._has_team = team is not None
        self._scratch_bytes = functools.lru_cache(maxsize=256)(program.scratch_bytes)
        self._entry = program.entry()
        self._run = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_char_p)(self._entry)
        self._fields = struct.Struct(f"={program.FIELDS}q").pack

    @property
    def threads(self) -> int:
        """How many threads a call may use now."""
        return torch.get_num_threads() if self._has_team else 1

    def describe(self) -> str:
        """One line: what runs, on how many threads, with how much memory for packed weights."""
        kind = "bfloat16" if self.packed.is_bf16 else "float32"
        threads = self.threads
        return (
            f"fused kernel on {threads} thread{'s' if threads > 1 else ''}, "
            f"{self.packed.bytes / 1e6:.1f} MB of packed {kind} weights a layer"
        )

    def __call__(self, hidden_TD: Tensor, ids_TK: Tensor, gates_TK: Tensor) -> tuple[Tensor, int]:
        """The result (T,D) and what the program returns. All contiguous, float32 and int64."""
        tokens, slots = ids_TK.shape
        threads = self.threads
        out_TD = torch.empty_like(hidden_TD)
        size = self._scratch_bytes(tokens, slots, *self._sizes, threads)
        scratch = torch.empty(size, dtype=torch.uint8)
        fields = self._fields(
            hidden_TD.data_ptr(), ids_TK.data_ptr(), gates_TK.data_ptr(), out_TD.data_ptr(),
            *self._addresses, scratch.data_ptr(), tokens, slots, *self._sizes, *self._flags,
            threads, *self._team, self._entry, 0, 0, 0,
        )  # fmt: skip
        # The program also writes to these bytes, which nothing else holds.
        return out_TD, self._run(fields)
