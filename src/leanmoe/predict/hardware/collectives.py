"""Seconds of what GPUs tell each other: all-reduce, all-gather, all-to-all. Needs no torch.

Letters: N GPUs of a group.
"""

from __future__ import annotations

import math

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
