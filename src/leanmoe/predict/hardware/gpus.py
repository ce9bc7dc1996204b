"""GPUs and how they are joined: what their makers state, how to add one, and what is reached of it.

Needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from leanmoe.core.errors import unknown_name
from leanmoe.core.files import read_json
from leanmoe.core.parsing import require
from leanmoe.core.schema import from_json


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
    gpu = from_json(Gpu, read_json(path, "hardware"), f"hardware {path}")
    for name, value in vars(gpu).items():
        if name != "name":
            require(value > 0, f"hardware {path}: {name}", value, "above 0")
    return gpu


@dataclass(frozen=True)
class Rates:
    """What the rest of a layer reaches of a GPU's stated rates, and what each call costs."""

    product_bandwidth: float
    product_flops: float
    product_seconds: float
    attention_bandwidth: float
    attention_flops: float
    attention_seconds: float
    attention_sequence_seconds: float
    """Seconds of each decoding sequence and each of its key-value heads on the GPU."""
    latent_bandwidth: float
    latent_flops: float
    latent_seconds: float
    """Seconds of a decoding layer of latent attention, beside its products."""
    latent_sequence_seconds: float
    """Seconds of each decoding sequence."""
    reduce_bandwidth: float
    reduce_seconds: float
    """Seconds of an engine's own all-reduce over 2 GPUs; each doubling adds `reduce_hop`."""
    reduce_hop: float
    exchange_bandwidth: float
    exchange_seconds: float
    """Seconds of an all-to-all, dispatch or combine."""
    network_bandwidth: float
    """Share of the link between nodes that an all-to-all reaches."""
    step_seconds: float = 0.0
    """Seconds of an engine's step beside the layers: scheduling, sampling, detokenising."""
    sampled_seconds: float = 0.0
    """Seconds of each sequence in a step."""
    layer_seconds: float = 0.0
    """Seconds of a layer beside products and attention: norms, rotations, cache writes, routing."""
    library_seconds: float = 0.0
    """Seconds of an all-reduce by the library (NCCL) over 2 GPUs."""
    library_hop: float = 0.0
    library_bandwidth: float = 0.0
    """0 where the library's all-reduce is not known."""
    gather_seconds: float = 0.0
    """Seconds of its all-gather or reduce-scatter over 2 GPUs."""
    gather_hop: float = 0.0
    gather_bandwidth: float = 0.0
    """0 where these are not known."""
    fitted_to: str = ""
