"""GPUs and how they are joined: what their makers state, and how to add one. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from leanmoe.core.errors import LeanMoeError, unknown_name
from leanmoe.core.files import read_json


@dataclass(frozen=True)
class Gpu:
    """A GPU as its maker states it, dense rates, and the network it is usually sold with."""

    name: str
    memory: float
    """Bytes."""
    bandwidth: float
    """Bytes a second of its memory."""
    flops: float
    """bf16, FLOP/s."""
    flops_fp8: float
    """fp8, FLOP/s; where there is no fp8, the bf16 rate."""
    multiprocessors: int
    per_node: int
    """GPUs joined by `link`."""
    link: float
    """Bytes/s of one GPU in one direction, within a node (NVLink, or PCIe where there is none)."""
    network: float
    """Bytes/s of one GPU in one direction, between nodes (InfiniBand)."""

    def link_between(self, gpus: int) -> float:
        """The slowest link that a group of `gpus` uses."""
        return self.link if gpus <= self.per_node else self.network

    def nodes(self, gpus: int) -> int:
        """Nodes that `gpus` fill."""
        return -(-gpus // self.per_node)


# GB, TB/s, bf16 and fp8 TFLOP/s, multiprocessors, GB/s of the link and of the network.
_SHEETS: Mapping[str, tuple[float, float, float, float, int, float, float]] = {
    "h200": (141, 4.8, 989, 1979, 132, 450, 50),
    "h100": (80, 3.35, 989, 1979, 132, 450, 50),
    "h20": (96, 4.0, 148, 296, 78, 450, 50),
    "b200": (180, 8.0, 2250, 4500, 148, 900, 50),
    "a100": (80, 2.039, 312, 312, 108, 300, 25),
    "a800": (80, 2.039, 312, 312, 108, 200, 25),
    "l40s": (48, 0.864, 362, 733, 142, 32, 25),
}
GPUS: Mapping[str, Gpu] = {
    name: Gpu(name, gb * 1e9, tb * 1e12, bf16 * 1e12, fp8 * 1e12, sms, 8, link * 1e9, net * 1e9)
    for name, (gb, tb, bf16, fp8, sms, link, net) in _SHEETS.items()
}
"""From NVIDIA's data sheets: dense rates, SXM where there is a choice."""


def read_gpu(name: str) -> Gpu:
    """A known GPU by name, or one described in a JSON file with the fields of `Gpu`.

    Raises LeanMoeError that lists the known ones and says how to add one.
    """
    if name.endswith(".json"):
        return _from_file(Path(name))
    known = GPUS.get(name.lower())
    if known is None:
        named = ", ".join(f.name for f in fields(Gpu))
        more = f"; to add one, give a JSON file with {named}"
        raise unknown_name("hardware", name, sorted(GPUS), more)
    return known


def _from_file(path: Path) -> Gpu:
    value = read_json(path, "hardware")
    names = [f.name for f in fields(Gpu)]
    if not isinstance(value, dict):
        raise LeanMoeError(f"hardware {path} is not a JSON object")
    if unknown := sorted(set(value) - set(names)):
        raise LeanMoeError(
            f"hardware {path} has an unknown field {unknown[0]!r}: allowed are {', '.join(names)}"
        )
    for name in names:
        found: Any = value.get(name)
        if name == "name":
            if not isinstance(found, str) or not found:
                raise LeanMoeError(f"hardware {path}: name is {found!r}: it must be a word")
        elif isinstance(found, bool) or not isinstance(found, int | float) or not found > 0:
            raise LeanMoeError(f"hardware {path}: {name} is {found!r}: it must be above 0")
    whole = {n: int(value[n]) for n in ("multiprocessors", "per_node")}
    return Gpu(**{**value, **whole})


def to_json(gpu: Gpu) -> dict[str, Any]:
    """The fields, for a results file or to start a description from."""
    return asdict(gpu)
