"""Device memory that is zero between calls: counters that every program leaves as it found them."""

from __future__ import annotations

import torch
from torch import Tensor

from leanmoe.core.errors import LeanMoeError

SPARE = 2
"""Counters that lie ready beyond those in use, for streams that are seen first in a capture."""

_in_use: dict[tuple[str, int, torch.device, int], Tensor] = {}
_spare: dict[tuple[str, int, torch.device], list[Tensor]] = {}


def zeros_for(
    name: str, size: int, device: torch.device, dtype: torch.dtype = torch.int32
) -> Tensor:
    """At least `size` zeros, kept for this use, device and stream.

    A graph captured on a stream keeps using that stream's: two graphs that are replayed at the
    same time must have been captured on streams of their own. None is made during a capture: it
    would lie in memory that graphs captured earlier write to, and be zero only after its own graph
    ran. So some are made ahead by calls outside of one, which engines make before they capture.
    Raises LeanMoeError where a capture is the first call.
    """
    stream, is_captured = _stream(device)
    key = (name, size, device, stream)
    spare = _spare.setdefault((name, size, device), [])
    missing = SPARE + (key not in _in_use) - len(spare)
    if missing and not is_captured:
        with torch.inference_mode(False):
            spare += [torch.zeros(size, dtype=dtype, device=device) for _ in range(missing)]
    if key not in _in_use:
        if not spare:
            raise LeanMoeError(
                f"counters for {name} are wanted on a stream that captures a graph: run the step "
                "once outside of a capture before"
            )
        _in_use[key] = spare.pop()
    return _in_use[key]


def _stream(device: torch.device) -> tuple[int, bool]:
    """The stream in use, and whether it captures a graph."""
    if device.type != "cuda":
        return 0, False
    return torch.cuda.current_stream(device).cuda_stream, torch.cuda.is_current_stream_capturing()


def power_of_two(number: int) -> int:
    """The least power of two that is not below."""
    return 1 << (number - 1).bit_length()
