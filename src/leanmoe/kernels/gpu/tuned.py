"""Which config runs: one found by `leanmoe kernels tune` for this GPU and shape, or a guess.

The files in `tuned/` are one for each GPU, shape and dtype; a user's own lie in the folder that
LEANMOE_TUNED names and come first.
"""

from __future__ import annotations

import logging
import os
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from leanmoe.errors import LeanMoeError
from leanmoe.kernels.gpu.config import ExpertsConfig, Tile
from leanmoe.kernels.weights import ExpertWeights
from leanmoe.storage import read_json

SHIPPED = Path(__file__).parent / "tuned"
OWN = "LEANMOE_TUNED"
SCHEMA_VERSION = 1

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

    @classmethod
    def of(cls, weights: ExpertWeights, slots: int) -> Shape:
        """The shape of a layer's weights when each token uses `slots` experts."""
        name = str(weights.gate_up.dtype).removeprefix("torch.")
        return cls(
            weights.experts, weights.hidden, weights.width, slots, name, weights.is_transposed
        )


@dataclass(frozen=True)
class Tuned:
    """The best configs found for one shape on one GPU, by number of tokens."""

    gpu: str
    shape: Shape
    buckets: tuple[tuple[int, ExpertsConfig], ...]
    """Tokens and the config found for them, tokens ascending."""
    provenance: dict[str, Any]

    def nearest(self, tokens: int) -> ExpertsConfig:
        """The config of the first bucket that is no smaller, else of the last."""
        fitting = (config for size, config in self.buckets if tokens <= size)
        return next(fitting, self.buckets[-1][1])

    def to_json(self) -> dict[str, Any]:
        """The file's content."""
        return {
            "leanmoe_kernels": SCHEMA_VERSION,
            "gpu": self.gpu,
            "shape": self.shape.__dict__,
            "buckets": [{"tokens": n, "config": c.to_json()} for n, c in self.buckets],
            "provenance": self.provenance,
        }

    @classmethod
    def load(cls, path: Path) -> Tuned:
        """Reads and checks a file."""
        value = read_json(path, "tuned kernels")
        if not isinstance(value, dict) or value.get("leanmoe_kernels") != SCHEMA_VERSION:
            raise LeanMoeError(f"{path} is no tuned-kernels file of version {SCHEMA_VERSION}")
        try:
            buckets = tuple(
                (int(b["tokens"]), ExpertsConfig.from_json(b["config"], f"{path.name}: config"))
                for b in value["buckets"]
            )
            shape = Shape(**value["shape"])
            found = cls(str(value["gpu"]), shape, buckets, dict(value["provenance"]))
        except (KeyError, TypeError, ValueError) as error:
            raise LeanMoeError(f"{path} is no tuned-kernels file: {error!r}") from error
        sizes = [size for size, _ in buckets]
        if not sizes or sizes != sorted(set(sizes)):
            raise LeanMoeError(f"{path}: buckets must have ascending tokens, they are {sizes}")
        return found


def file_name(gpu: str, shape: Shape) -> str:
    """Where the configs of a GPU and shape are kept."""
    plain = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    sizes = f"e{shape.experts}-d{shape.hidden}-m{shape.width}-k{shape.slots}"
    layout = "-transposed" if shape.is_transposed else ""
    return f"{plain}-{sizes}-{shape.dtype}{layout}.json"


def config_for(weights: ExpertWeights, tokens: int, slots: int) -> ExpertsConfig:
    """The config to run: tuned for this GPU and shape if there is one, else `guess`.

    A tuned shape with another number of slots stands in: fewer of them are fewer rows.
    """
    tuned = _find(_gpu(weights), Shape.of(weights, slots))
    if tuned is None:
        _say_once(_gpu(weights), Shape.of(weights, slots))
        return guess(tokens, weights)
    config = tuned.nearest(tokens)
    if config.is_direct and tokens > config.rows:
        config = guess(tokens, weights)
    return config


def describe(weights: ExpertWeights) -> str:
    """Where the configs for these weights come from, whatever the number of slots."""
    tuned = _find(_gpu(weights), Shape.of(weights, 0))
    source = "a guess" if tuned is None else f"tuned on {tuned.gpu}"
    return f"{Shape.of(weights, 0).dtype} weights, tiles {source}"


def _gpu(weights: ExpertWeights) -> str:
    device = weights.gate_up.device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"


def guess(tokens: int, weights: ExpertWeights) -> ExpertsConfig:
    """A config that runs on any GPU of compute capability 8 or more, for a shape nobody tuned."""
    if weights.gate_up_scale is not None:
        wide, rows = Tile(128, 128, 8, 3), 16 if tokens <= 512 else 64
        return ExpertsConfig(rows, 0, tokens <= 16, wide, Tile(64, 128, 4, 3))
    depth = 32 if weights.gate_up.dtype.itemsize == 4 else 64
    few = Tile(columns=32, depth=depth, warps=4, stages=3, weights_left=False)
    if tokens <= 16:
        return ExpertsConfig(16, 0, True, few, Tile(64, depth, 4, 3, weights_left=False))
    if tokens <= 512:
        return ExpertsConfig(16, 0, False, few, Tile(64, depth, 4, 3, weights_left=False))
    many = Tile(64, depth, 4, 3, 1, weights_left=False)
    return ExpertsConfig(64, 0, False, many, Tile(128, depth, 4, 3, 1, False))


@lru_cache(maxsize=256)
def _find(gpu: str, shape: Shape) -> Tuned | None:
    folders = [SHIPPED]
    if own := os.environ.get(OWN):
        folders.insert(0, Path(own))
    for folder in folders:
        exact = folder / file_name(gpu, shape)
        if exact.is_file():
            return Tuned.load(exact)
        pattern = file_name(gpu, shape).replace(f"-k{shape.slots}-", "-k*-")
        for path in sorted(folder.glob(pattern)):
            return Tuned.load(path)
    return None


@lru_cache(maxsize=256)
def _say_once(gpu: str, shape: Shape) -> None:
    logger.warning(
        "no tuned kernels for %s and %s: a guess runs; `leanmoe kernels tune` finds better",
        gpu,
        shape,
    )
