"""Device memory that is zero between calls: counters that every program leaves as it found them."""

from __future__ import annotations

import torch
from torch import Tensor

_buffers: dict[tuple[str, int, torch.device, int], Tensor] = {}


def zeros_for(
    name: str, size: int, device: torch.device, dtype: torch.dtype = torch.int32
) -> Tensor:
    """At least `size` zeros, kept for this use, device and stream.

    A graph captured on a stream keeps using that stream's: two graphs that are replayed at the
    same time must have been captured on streams of their own.
    """
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    key = (name, size, device, stream)
    if key not in _buffers:
        with torch.inference_mode(False):
            _buffers[key] = torch.zeros(size, dtype=dtype, device=device)
    return _buffers[key]


def power_of_two(number: int) -> int:
    """The least power of two that is not below."""
    return 1 << (number - 1).bit_length()
