"""Every tile that comes with leanmoe computes what it should, on the GPU at hand.

Compilers err: a program may be right in the interpreter and wrong on a GPU, with one tile and not
with another. Layers have the shipped widths and fewer experts, with as many rows each.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

import pytest
import torch

pytest.importorskip("triton")

from leanmoe.kernels import ExpertWeights
from leanmoe.kernels.triton.config import ExpertsConfig
from leanmoe.kernels.triton.tune_tiles import MOST_ERROR, error_of, random_call, random_weights
from leanmoe.kernels.triton.tuned_tiles import SHIPPED, Shape, Tuned, capability_of

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
EXPERTS = 16


def shipped() -> Iterator[tuple[str, Tuned, int, ExpertsConfig]]:
    """Each config of each file once, with the most tokens it was found for."""
    for path in sorted(SHIPPED.glob("*.json")):
        tuned = Tuned.load(path)
        most = {config: tokens for tokens, config in tuned.buckets}
        for config, tokens in most.items():
            yield f"{path.stem}-{tokens}", tuned, tokens, config


CASES = list(shipped())


@lru_cache(maxsize=1)
def layer(shape: Shape) -> ExpertWeights:
    return random_weights(shape)


@needs_gpu
@pytest.mark.parametrize(("tuned", "tokens", "config"), [case[1:] for case in CASES], ids=[
    case[0] for case in CASES
])  # fmt: skip
def test_a_shipped_tile_computes_what_it_should(
    tuned: Tuned, tokens: int, config: ExpertsConfig
) -> None:
    if tuned.capability != capability_of():
        pytest.skip(f"tiles of compute capability {tuned.capability}, this GPU has another")
    shape = replace(tuned.shape, experts=EXPERTS)
    few = tokens if config.is_direct else max(EXPERTS, tokens * EXPERTS // tuned.shape.experts)
    for number in {few, max(1, few * 3 // 4)}:
        error = error_of(config, layer(shape), random_call(shape, number, number))
        assert error <= MOST_ERROR[shape.dtype], f"{error:.1%} off at {number} tokens"
