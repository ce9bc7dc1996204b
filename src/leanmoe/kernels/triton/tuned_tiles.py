"""Which config runs: one found by `leanmoe kernels tune` for this GPU and shape, or a guess.

The files in `tuned/` are one for each GPU, shape and dtype; a user's own lie in the folder that
LEANMOE_TUNED names and come first. A GPU that nobody tuned takes the tiles of another with the same
compute capability: the H100 and H200, say, differ in their memory alone.
"""

from __future__ import annotations

import logging
import os
import re
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch

from leanmoe.core.errors import LeanMoeError
from leanmoe.core.schema import StoredFile
from leanmoe.kernels.triton.config import ExpertsConfig, Tile
from leanmoe.kernels.weights import ExpertWeights

SHIPPED = Path(__file__).parent / "tuned"
OWN = "LEANMOE_TUNED"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shape:
    """What a tuned config was found for; the gate hardly matters."""

    experts: int
    hidden: int
    width: int
    slots: int
    dtype: str
    is_transposed: bool = False
    """Whether the weights are (E,D,2M) and (E,M,D), as gpt-oss keeps them."""

    def __str__(self) -> str:
        slots = f", {self.slots} slots a token" if self.slots else ""  # 0: of any number
        return f"{self.experts} experts of {self.hidden} x {self.width} in {self.dtype}{slots}"

    @classmethod
    def of(cls, weights: ExpertWeights, slots: int) -> Shape:
        """The shape of a layer's weights when each token uses `slots` experts."""
        name = str(weights.gate_up.dtype).removeprefix("torch.")
        return cls(
            weights.experts, weights.hidden, weights.width, slots, name, weights.is_transposed
        )


@dataclass(frozen=True)
class Bucket:
    """The best config found for steps of so many tokens."""

    tokens: int
    config: ExpertsConfig


@dataclass(frozen=True)
class Tuned(StoredFile):
    """The best configs found for one shape on one GPU, by number of tokens."""

    KIND: ClassVar[str] = "leanmoe_kernels"
    VERSION: ClassVar[int] = 2
    WHAT: ClassVar[str] = "tuned-kernels file"

    gpu: str
    capability: str
    """The GPU's compute capability, like "9.0"."""
    shape: Shape
    buckets: tuple[Bucket, ...]
    """By tokens, ascending."""
    provenance: dict[str, Any]

    def __post_init__(self) -> None:
        sizes = [bucket.tokens for bucket in self.buckets]
        if not sizes or sizes != sorted(set(sizes)):
            raise LeanMoeError(f"tuned kernels have buckets of {sizes} tokens: they must ascend")

    def nearest(self, tokens: int) -> ExpertsConfig:
        """The config of the first bucket that is no smaller, else of the last."""
        fitting = (bucket.config for bucket in self.buckets if tokens <= bucket.tokens)
        return next(fitting, self.buckets[-1].config)


def file_name(gpu: str, shape: Shape) -> str:
    """Where the configs of a GPU and shape are kept."""
    plain = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    sizes = f"e{shape.experts}-d{shape.hidden}-m{shape.width}-k{shape.slots}"
    layout = "-transposed" if shape.is_transposed else ""
    return f"{plain}-{sizes}-{shape.dtype}{layout}.json"


def config_for(weights: ExpertWeights, tokens: int, slots: int) -> ExpertsConfig:
    """The config to run: tuned for this shape if there is one, else `guess`.

    A tuned shape with another number of slots stands in: fewer of them are fewer rows.
    """
    tuned = _find(*_gpu(weights.gate_up.device), Shape.of(weights, slots))
    if tuned is None:
        return guess(tokens, weights)
    config = tuned.nearest(tokens)
    return guess(tokens, weights) if config.is_direct and tokens > config.BLOCK_M else config


def describe(weights: ExpertWeights) -> str:
    """Where the configs for these weights come from, whatever the number of slots."""
    tuned = _find(*_gpu(weights.gate_up.device), Shape.of(weights, 0))
    source = "a guess" if tuned is None else f"tuned on {tuned.gpu}"
    return f"{Shape.of(weights, 0).dtype} weights, tiles {source}"


def capability_of(device: torch.device | None = None) -> str:
    """A CUDA device's compute capability, like "9.0"."""
    return ".".join(map(str, torch.cuda.get_device_capability(device)))


@lru_cache(maxsize=64)
def _gpu(device: torch.device) -> tuple[str, str]:
    """Name and compute capability of a GPU."""
    if device.type != "cuda":
        return "interpreter", ""
    return torch.cuda.get_device_name(device), capability_of(device)


def guess(tokens: int, weights: ExpertWeights) -> ExpertsConfig:
    """A config that runs on any GPU of compute capability 8 or more, for a shape nobody tuned."""
    if weights.gate_up_scale is not None:
        wide, down = Tile(128, 128, 8, 3), Tile(64, 128, 4, 3)
        if tokens <= 512:
            return ExpertsConfig(16, 0, tokens <= 16, wide, down, fp8_terms=2)
        return ExpertsConfig(64, 0, False, wide, replace(down, BLOCK_K=64), float16_act=True)
    block_k = 32 if weights.gate_up.dtype.itemsize == 4 else 64
    few = Tile(BLOCK_N=32, BLOCK_K=block_k, num_warps=4, num_stages=3, swap_ab=False)
    if tokens <= 16:
        return ExpertsConfig(16, 0, True, few, Tile(64, block_k, 4, 3, swap_ab=False))
    if tokens <= 512:
        return ExpertsConfig(16, 0, False, few, Tile(64, block_k, 4, 3, swap_ab=False))
    many = Tile(64, block_k, 4, 3, 1, swap_ab=False)
    return ExpertsConfig(64, 0, False, many, Tile(128, block_k, 4, 3, 1, False))


@lru_cache(maxsize=256)
def _find(gpu: str, capability: str, shape: Shape) -> Tuned | None:
    """The nearest that is known of a shape: of this GPU before another, of these slots before."""
    folders = [SHIPPED]
    if own := os.environ.get(OWN):
        folders.insert(0, Path(own))
    any_slots = file_name("*", shape).replace(f"-k{shape.slots}-", "-k*-").removeprefix("-")
    known = [Tuned.load(path) for f in folders for path in sorted(f.glob(f"*{any_slots}"))]
    near = [tuned for tuned in known if tuned.gpu == gpu or tuned.capability == capability]
    if not near:
        logger.warning(
            "no tuned kernels for %s and %s: a guess runs; `leanmoe kernels tune` finds better",
            gpu,
            shape,
        )
        return None
    best = min(near, key=lambda tuned: (tuned.gpu != gpu, tuned.shape.slots != shape.slots))
    if best.gpu != gpu:
        logger.info("no tuned kernels for %s: those of %s run, for %s", gpu, best.gpu, shape)
    return best
