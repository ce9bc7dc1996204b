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
    """Of each sequence that decodes and each of its key-value heads on the GPU."""
    latent_bandwidth: float
    latent_flops: float
    latent_seconds: float
    """Of a layer of latent attention that decodes, beside its products."""
    latent_sequence_seconds: float
    """Of each sequence that decodes."""
    reduce_bandwidth: float
    reduce_seconds: float
    """Of an engine's own all-reduce over 2 GPUs; each doubling of them adds `reduce_hop`."""
    reduce_hop: float
    exchange_bandwidth: float
    exchange_seconds: float
    """Of an all-to-all, dispatch or combine."""
    network_bandwidth: float
    """Share of the link between nodes that an all-to-all reaches."""
    step_seconds: float = 0.0
    """Of an engine's step beside the layers: scheduling, sampling, detokenising."""
    sampled_seconds: float = 0.0
    """Of each sequence in it."""
    layer_seconds: float = 0.0
    """Of a layer beside its products and attention: norms, rotations, cache writes, routing."""
    library_seconds: float = 0.0
    """Of an all-reduce by the library (NCCL) over 2 GPUs."""
    library_hop: float = 0.0
    library_bandwidth: float = 0.0
    """0 where the library's all-reduce is not known."""
    gather_seconds: float = 0.0
    """Of its all-gather or reduce-scatter over 2 GPUs."""
    gather_hop: float = 0.0
    gather_bandwidth: float = 0.0
    """0 where these are not known."""
    fitted_to: str = ""
