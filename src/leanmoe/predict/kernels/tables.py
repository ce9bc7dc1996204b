"""AIConfigurator's measured kernel tables, read from the installed package; none is copied here.

`pip install 'leanmoe[predict]'` installs aiconfigurator-core (Apache-2.0, NVIDIA) and pyarrow.
Without them leanmoe predicts from its own fitted constants. Tables hold one MoE layer's experts in
CUDA graphs; experts are chosen in a fixed pattern ("balanced") that activates as many as possible.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from leanmoe.core.errors import LeanMoeError
from leanmoe.models.shape import MoEShape
from leanmoe.predict.kernels.features import ExpertsShape, Rows

PACKAGE = "aiconfigurator-core"


VERSION = "0.12.0"
"""The version whose columns are known here, and whose figures the docs give."""
SYSTEMS = {
    "h200": "h200_sxm",
    "h100": "h100_sxm",
    "b200": "b200_sxm",
    "a100": "a100_sxm",
    "l40s": "l40s",
}
"""Our names of GPUs, and the package's."""
KERNEL_FORMATS: Mapping[str, str] = {
    "bfloat16": "bfloat16",
    "float16": "bfloat16",
    "fp8": "fp8_block",
    "mxfp4": "w4a16_mxfp4",
}
"""Formats of stored experts whose kernels were measured, and the tables' names."""
WEIGHT_BYTES = {
    "bfloat16": 2.0,
    "fp8": 1.0,
    "fp8_block": 1 + 4 / 128**2,
    "w4a16_mxfp4": 0.5 + 1 / 32,
    "int4_wo": 0.5 + 2 / 128,
}
"""Bytes of a weight, its share of the scales included, by the package's names of formats."""
ACTIVATION_BYTES = {"fp8": 1.0, "fp8_block": 1.0}
PADDED_TO = {"w4a16_mxfp4": 128}
"""Multiple of widths that a format pads to, where it does."""
UNGATED = ((2688, 1856), (2048, 5120), (8192, 5120), (1024, 2688))
"""Hidden and expert width of the tables' experts without a gate (Nemotron-H)."""
GROUPED = ((7168, 2048, 256, 8),)
"""Shapes that vLLM and SGLang ran through a router with 8 groups of which 4 are used: the
"balanced" pattern activates half of the experts there, although the tables do not say so."""


GROUPS, GROUPS_USED = 8, 4
GROUPED_LEAST_TOKENS = 32
"""Below it, which experts break the router's ties is not known, and so neither how many are
active."""


def kernel_format(model: MoEShape) -> str:
    """The format of the kernel that computes the experts: bf16's where none is known."""
    return KERNEL_FORMATS.get(model.storage.name, "bfloat16")


def is_as_if(model: MoEShape) -> bool:
    """Whether no kernel for the experts' format is known, and bf16's stands in for it."""
    return model.storage.name not in KERNEL_FORMATS


@dataclass(frozen=True)
class Table:
    """Where one kernel's measurements stand."""

    kernel: str
    """Our name."""
    dtype: str
    file: str
    """Under systems/data/SYSTEM."""
    source: str
    """The package's name of the kernel."""


_VLLM, _SGLANG, _TRTLLM = (
    f"moe/{engine}/moe_perf.parquet"
    for engine in ("vllm/0.24.0", "sglang/0.5.14", "trtllm/1.3.0rc20")
)
_FLASHINFER, _OAI = "flashinfer_cutlass_flashinferexperts", "oaitritonmxfp4expertsmonolithic"
TABLES = (
    Table("vllm-triton", "bfloat16", _VLLM, "vllm_unquantizedfusedmoe_triton_tritonexperts"),
    Table("vllm-triton", "fp8_block", _VLLM, "vllm_fp8moe_triton_tritonexperts"),
    Table("vllm-flashinfer", "fp8_block", _VLLM, f"vllm_fp8moe_{_FLASHINFER}"),
    Table("vllm-flashinfer", "fp8", _VLLM, f"vllm_modeloptfp8moe_{_FLASHINFER}"),
    Table("vllm-triton", "w4a16_mxfp4", _VLLM, f"vllm_gptossmxfp4moe_triton_{_OAI}"),
    Table("sglang-triton", "bfloat16", _SGLANG, "sglang_fused_moe_triton"),
    Table("sglang-triton", "fp8_block", _SGLANG, "sglang_fused_moe_triton"),
    Table("trtllm-cutlass", "bfloat16", _TRTLLM, "moe_torch_flow_cutlass"),
    Table("trtllm-cutlass", "fp8", _TRTLLM, "moe_torch_flow_cutlass"),
    Table("trtllm-cutlass", "fp8_block", _TRTLLM, "moe_torch_flow_cutlass"),
)
KEY = ("hidden_size", "inter_size", "num_experts", "topk", "moe_tp_size", "moe_ep_size")
"""The columns of `Measured.key`."""


@dataclass(frozen=True)
class Measured:
    """One row of a table: a layer's experts at one number of tokens."""

    hidden: int
    width: int
    """Width of an expert, before tensor parallelism."""
    experts: int
    """On all GPUs."""
    top_k: int
    tensor: int
    expert: int
    """GPUs of tensor and of expert parallelism; the row is the first of them."""
    tokens: int
    seconds: float

    @property
    def key(self) -> tuple[int, int, int, int, int, int]:
        """Everything but the tokens."""
        return (self.hidden, self.width, self.experts, self.top_k, self.tensor, self.expert)

    def shape(self, dtype: str) -> ExpertsShape:
        """The experts as that GPU holds them."""
        return ExpertsShape(
            self.hidden,
            self.width / self.tensor,
            self.experts // self.expert,
            2 if (self.hidden, self.width) in UNGATED else 3,
            WEIGHT_BYTES[dtype],
            ACTIVATION_BYTES.get(dtype, 2.0),
            PADDED_TO.get(dtype, 1),
        )

    def is_grouped(self, kernel: str) -> bool:
        """Whether the kernel's router limited groups, unsaid."""
        shape = (self.hidden, self.width, self.experts, self.top_k)
        return shape in GROUPED and not kernel.startswith("trtllm")

    def rows(self, kernel: str) -> Rows:
        """What the table's pattern gives that GPU."""
        grouped = self.is_grouped(kernel)
        counts = balanced_counts(self.tokens, self.experts, self.top_k, self.expert, grouped)
        return Rows(self.tokens, self.top_k, sum(counts), len(counts), counts)


@cache
def balanced_counts(
    tokens: int, experts: int, top_k: int, ranks: int, grouped: bool = False
) -> tuple[int, ...]:
    """Rows of each active expert of the first of `ranks` GPUs under the tables' balanced pattern.

    Token t takes the experts t + j * ceil(E / k), j = 0..k-1, modulo E; with fewer tokens than
    that stride they are spread over it. `grouped`: a router keeps the first half of 8 groups, and
    the experts that fill a token's k up are taken as spread evenly over these.
    """
    stride = math.ceil(experts / top_k)
    token_T1 = np.arange(tokens)[:, None]
    slot_K = np.arange(top_k)
    step_T1 = token_T1 if tokens >= stride else np.floor(token_T1 * stride / tokens)
    chosen_TK = ((step_T1 + slot_K * stride) % experts).astype(np.int64)
    count_E = np.bincount(chosen_TK.ravel(), minlength=experts)
    if grouped:
        count_E[experts * GROUPS_USED // GROUPS :] = 0
        count_E = count_E * GROUPS // GROUPS_USED
    mine_E = count_E[: experts // ranks]
    return tuple(int(count) for count in mine_E if count)


def installed() -> str | None:
    """The installed version of the tables' package, or None."""
    if find_spec("aiconfigurator_core") is None or find_spec("pyarrow") is None:
        return None
    try:
        return metadata.version(PACKAGE)
    except metadata.PackageNotFoundError:
        return None


def read_columns(system: str, file: str) -> dict[str, NDArray[Any]]:
    """Columns of a table of a GPU; raises LeanMoeError where the package or table is missing."""
    version = installed()
    if version != VERSION:
        found = "not installed" if version is None else f"version {version}"
        raise LeanMoeError(
            f"{PACKAGE} is {found}: version {VERSION} is needed to read measured tables: "
            "pip install 'leanmoe[predict]'"
        )
    path = _folder() / SYSTEMS.get(system, system) / file
    if not path.exists():
        raise LeanMoeError(f"{PACKAGE} {VERSION} has no table {file} for {system}")
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(path)
    return {name: table[name].to_numpy(zero_copy_only=False) for name in table.column_names}


def _folder() -> Path:
    spec = find_spec("aiconfigurator_core")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "systems" / "data"


@cache
def _moe_columns(system: str, file: str) -> Mapping[str, NDArray[Any]]:
    return read_columns(system, file)


@cache
def read_table(gpu: str, table: Table, distribution: str = "balanced") -> tuple[Measured, ...]:
    """All rows of a kernel on a GPU with that way to choose experts."""
    columns = _moe_columns(gpu, table.file)
    wanted = (
        (columns["kernel_source"] == table.source)
        & (columns["moe_dtype"] == table.dtype)
        & (columns["distribution"] == distribution)
    )
    whole = [columns[name][wanted].astype(int).tolist() for name in (*KEY, "num_tokens")]
    seconds = (columns["latency"][wanted].astype(float) / 1e3).tolist()
    return tuple(Measured(*row) for row in zip(*whole, seconds, strict=True))


def measured_curve(
    gpu: str, kernel: str, dtype: str, key: tuple[int, int, int, int, int, int]
) -> list[Measured]:
    """The rows of one layer's shape by rising tokens; none where nobody measured it.

    Rows whose active experts are not known (a grouped router's ties) are left out.
    """
    if installed() != VERSION or gpu not in SYSTEMS:
        return []
    tables = [each for each in TABLES if (each.kernel, each.dtype) == (kernel, dtype)]
    try:
        rows = [row for table in tables for row in _by_key(gpu, table).get(key, ())]
    except LeanMoeError:  # this GPU has no such table
        return []
    known = [r for r in rows if r.tokens >= GROUPED_LEAST_TOKENS or not r.is_grouped(kernel)]
    return sorted(known, key=lambda row: row.tokens)


@cache
def _by_key(gpu: str, table: Table) -> Mapping[tuple[int, ...], list[Measured]]:
    rows: dict[tuple[int, ...], list[Measured]] = defaultdict(list)
    for row in read_table(gpu, table):
        rows[row.key].append(row)
    return rows
