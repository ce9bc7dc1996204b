"""Seconds of what GPUs tell each other: all-reduce, all-gather, all-to-all. Needs no torch.

Letters: N GPUs of a group.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from leanmoe.core.errors import LeanMoeError
from leanmoe.core.files import read_json
from leanmoe.predict.hardware.gpus import Gpu, Rates

EXCHANGED_BYTES = 1.5
"""Bytes of an activation on its way to an expert (fp8) and back (bf16), mean of both."""
PCIE = 64e9
"""Bytes/s of a link that is no NVLink. Over it vLLM has no all-reduce of its own for more than two
GPUs ("not supported on more than two PCIe-only GPUs", its log says)."""


def reduce_seconds(rates: Rates, gpu: Gpu, size: float, gpus: int) -> float:
    """An all-reduce of `size` bytes: a ring sends 2(N-1)/N of them (arXiv 2505.03531, TP).

    Within a node engines have a kernel of their own beside the library's (NCCL): the faster one
    counts, where both are known and the GPUs are joined well enough for it.
    """
    own = rates.reduce_seconds + _hops(gpus) * rates.reduce_hop
    own += _ring(size, gpus, gpu.link_between(gpus) * rates.reduce_bandwidth, 2)
    if not rates.library_bandwidth or gpus > gpu.per_node:
        return own
    library = library_reduce_seconds(rates, gpu, size, gpus)
    return min(own, library) if gpus == 2 or gpu.link > PCIE else library


def library_reduce_seconds(rates: Rates, gpu: Gpu, size: float, gpus: int) -> float:
    """An all-reduce by the library; an engine's own where the library's is not known."""
    if not rates.library_bandwidth:
        return reduce_seconds(rates, gpu, size, gpus)
    start = rates.library_seconds + _hops(gpus) * rates.library_hop
    return start + _ring(size, gpus, gpu.link_between(gpus) * rates.library_bandwidth, 2)


def gather_seconds(rates: Rates, gpu: Gpu, size: float, gpus: int) -> float:
    """An all-gather or a reduce-scatter, of `size` bytes summed over all GPUs: a ring sends
    (N-1)/N of them. As an all-to-all where neither was measured.

    Between nodes rings enter and leave a node through all of its GPUs' networks, and go on
    within it: the slower of both counts.
    """
    if not rates.gather_bandwidth:
        start, bandwidth = rates.exchange_seconds, rates.exchange_bandwidth
    else:
        start = rates.gather_seconds + _hops(gpus) * rates.gather_hop
        bandwidth = rates.gather_bandwidth
    within = _ring(size, gpus, gpu.link * bandwidth, 1)
    network = gpu.per_node * gpu.network * rates.network_bandwidth
    return start + max(within, _ring(size, gpu.nodes(gpus), network, 1))


def exchange_seconds(
    rates: Rates, gpu: Gpu, tokens: float, touched: float, hidden: int, gpus: int
) -> float:
    """Dispatch or combine of a GPU's `tokens`, each of which `touched` GPUs have experts of.

    The paper's bound is 2 k L d for both ways; here a GPU that holds two of a token's experts
    gets it once, and what stays on the GPU is not sent. Activations travel as fp8 to the
    experts and as bf16 back (DeepEP): on average 1.5 bytes.
    """
    sent = tokens * touched * (gpus - 1) / gpus * hidden * EXCHANGED_BYTES
    inside = min(1.0, gpu.per_node / gpus)
    within = sent * inside / (gpu.link * rates.exchange_bandwidth)
    between = sent * (1 - inside) / (gpu.network * rates.network_bandwidth)
    return rates.exchange_seconds + max(within, between)


def _ring(size: float, gpus: int, rate: float, times: int) -> float:
    return times * (gpus - 1) / gpus * size / rate


def _hops(gpus: int) -> float:
    return math.log2(gpus) - 1


BENCHMARK = "communication"


ALL_REDUCE, ALL_TO_ALL = "all_reduce", "all_to_all"


GATHERING = ("all_gather", "reduce_scatter")


@dataclass(frozen=True)
class Collectives:
    """Medians of one group of GPUs of one node."""

    hardware: str
    gpus: int
    seconds: Mapping[str, Mapping[int, float]]
    """By operation and bytes of one GPU's message: what it adds up, or what it sends to all
    GPUs, itself included."""


def read_collectives(path: Path) -> Collectives:
    """Reads what the benchmark wrote; LeanMoeError where it is no such file, or damaged."""
    value = read_json(path, "communication times")
    if not isinstance(value, dict) or value.get("leanmoe_benchmark") != BENCHMARK:
        raise LeanMoeError(f"{path} is no result of benchmarks/predict/communication.py")
    try:
        seconds = {
            name: {int(size): _positive(entry["median"]) for size, entry in sizes.items()}
            for name, sizes in value["seconds"].items()
        }
        found = Collectives(str(value["provenance"]["hardware"]), int(value["gpus"]), seconds)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise LeanMoeError(f"communication times {path} are damaged ({reason})") from error
    if found.gpus < 2 or any(len(found.seconds.get(n, {})) < 2 for n in (ALL_REDUCE, ALL_TO_ALL)):
        raise LeanMoeError(
            f"communication times {path} have too little to fit to: at least 2 GPUs, and 2 sizes "
            f"of {ALL_REDUCE} and {ALL_TO_ALL} are needed"
        )
    return found


def _positive(value: Any) -> float:
    if not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"a time is {value!r}")
    return float(value)


def fitted(rates: Rates, measured: Collectives, gpu: Gpu) -> Rates:
    """The rates with the library's collectives as measured on GPUs of this kind.

    An engine's own all-reduce is not among them and stays as it is. A call costs a constant time
    and its bytes at a constant rate. Both are the least squares of relative errors. One number of
    GPUs says nothing of a further hop: its cost stays as it is.
    """
    gpus = measured.gpus
    hops, share = math.log2(gpus) - 1, (gpus - 1) / gpus
    reduce, reduce_rate = _line([measured.seconds[ALL_REDUCE]], 2 * share)
    exchange, exchange_rate = _line([measured.seconds[ALL_TO_ALL]], share)
    found = replace(
        rates,
        library_seconds=max(0.0, reduce - hops * rates.library_hop),
        library_bandwidth=reduce_rate / gpu.link,
        exchange_seconds=exchange,
        exchange_bandwidth=exchange_rate / gpu.link,
        fitted_to=f"{rates.fitted_to}; collectives measured on {gpus} x {measured.hardware}",
    )
    gathering = [measured.seconds[name] for name in GATHERING if measured.seconds.get(name)]
    if not gathering:
        return found
    gather, gather_rate = _line(gathering, share)
    return replace(
        found,
        gather_seconds=max(0.0, gather - hops * rates.gather_hop),
        gather_bandwidth=gather_rate / gpu.link,
    )


def _line(operations: Sequence[Mapping[int, float]], share: float) -> tuple[float, float]:
    """Seconds of a call without bytes, and bytes a second of the `share` that travels; of all
    these operations alike."""
    points = [point for seconds in operations for point in seconds.items()]
    sizes, times = np.array(points, dtype=float).T
    columns = np.stack((np.ones_like(sizes), sizes * share), axis=-1) / times[:, None]
    (start, each), *_ = np.linalg.lstsq(columns, np.ones_like(times), rcond=None)
    if each <= 0:
        raise LeanMoeError("communication times do not rise with the bytes: nothing can be fitted")
    return max(0.0, float(start)), 1 / float(each)
