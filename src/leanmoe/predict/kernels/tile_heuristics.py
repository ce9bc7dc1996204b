"""Which tiles a kernel takes, by the tokens of a step: what decides how its time grows.

vLLM 0.24.0 and SGLang 0.5.14 take tiles from a tuned configuration where they have one of this very
layer (by experts and expert width on a GPU), else by rules of their own. Both are public
(Apache-2.0: vLLM's `fused_moe.get_default_config`, SGLang's `fused_moe_triton_config`). OpenAI's
Triton kernels take as many rows as an expert has on average, rounded up to a power of two. What
CUTLASS takes is tuned where it runs and not known: the better of two is fitted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from leanmoe.predict.kernels.features import TILES, PredictedTile

ANY = 1e9
"""More tokens than any step has."""


@dataclass(frozen=True)
class StepRange:
    """A range of steps that constants are fitted to, and the tiles that a kernel may take there."""

    up_to: float
    """Tokens of the step."""
    tiles: tuple[PredictedTile, ...] | None
    """The best of these; None: the one that a tuned configuration names."""
    tokens_an_expert: float | None = None
    slots_an_expert: float | None = None


def stages(
    edges: Sequence[float], tiles: tuple[PredictedTile, ...] | None = TILES
) -> tuple[StepRange, ...]:
    """Ranges of tokens that end at `edges`, all with the same tiles."""
    return tuple(StepRange(edge, tiles) for edge in edges)


TUNED = stages((4, 32, 96, 512, 2048, ANY), None)
"""Stages of layers with a tuned configuration."""
CUTLASS = stages((4, 32, 64, 96, 512, 2048, ANY), (PredictedTile(64, 128), PredictedTile(128, 128)))
SCHEDULES: Mapping[tuple[str, str], tuple[StepRange, ...]] = {
    ("vllm-triton", "bfloat16"): (
        *stages((4, 32), (PredictedTile(16, 64),)),
        StepRange(64, (PredictedTile(32, 64),)),
        StepRange(96, (PredictedTile(32, 128),)),
        StepRange(512, (PredictedTile(64, 128),)),
        *stages((2048, ANY), (PredictedTile(128, 128),)),
    ),
    ("vllm-triton", "fp8_block"): (
        *stages((4, 16, 64), (PredictedTile(16, 128),)),
        *stages((512, 2048, ANY), (PredictedTile(64, 128),)),
    ),
    ("sglang-triton", "bfloat16"): (
        *(StepRange(edge, (PredictedTile(16, 32),), tokens_an_expert=1) for edge in (4, 32, ANY)),
        *stages((96, 512, 2048, ANY), (PredictedTile(64, 64),)),
    ),
    ("sglang-triton", "fp8_block"): stages((4, 32, 96, 512, 2048, ANY), (PredictedTile(64, 128),)),
    ("vllm-triton", "w4a16_mxfp4"): tuple(
        StepRange(ANY, (PredictedTile(rows, 128), PredictedTile(rows, 256)), slots_an_expert=limit)
        for rows, limit in ((16, 16), (32, 32), (64, 64), (128, None))
    ),
}
"""By kernel and format; `CUTLASS` for those that are not here."""
GATHERED = ("vllm-triton", "vllm-flashinfer")
"""Kernels of an engine whose data-parallel ranks gather each other's tokens: each GPU sees all
tokens of a step and computes its own experts' rows (vLLM's `allgather_reducescatter`, its
default). Other engines are taken to send a token only to the GPUs that hold its experts."""
