"""What everything but the experts reaches of a GPU's stated rates, and what each call costs."""

from __future__ import annotations

from dataclasses import dataclass


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
