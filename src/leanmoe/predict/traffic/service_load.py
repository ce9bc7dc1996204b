"""The load a service is under: a concurrency or arrivals at random, and lengths."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from leanmoe.core.errors import LeanMoeError

LONGEST = 1_048_576
STEP_TOKENS = 8192
"""Tokens of a step at most: all that decodes, and parts of prompts (vLLM's default on servers)."""


@dataclass(frozen=True)
class LengthDistribution:
    """How many tokens: always the same, evenly within a range, log-normal, or as counted."""

    text: str
    values: tuple[int, ...]
    """Equally likely values (quantiles of the distribution)."""

    @property
    def mean(self) -> float:
        """Mean tokens."""
        return float(np.mean(self.values))

    @property
    def remaining(self) -> float:
        """Mean tokens behind a request seen at a random moment: E[n^2] / 2E[n]."""
        values = np.array(self.values, dtype=float)
        return float((values**2).mean() / (2 * values.mean()))

    def draw(self, count: int, draw: np.random.Generator) -> NDArray[np.int64]:
        """`count` lengths at random."""
        return np.asarray(draw.choice(np.array(self.values, dtype=np.int64), size=count))


QUANTILES = 64


def read_lengths(text: str, flag: str) -> LengthDistribution:
    """Lengths from "1024", "512:2048" (even), "1024~0.8" (median, sigma) or a file, one a line."""
    path = Path(text)
    if path.suffix in (".txt", ".csv") or path.is_file():
        return _from_file(path, flag)
    try:
        if "~" in text:
            median, sigma = (float(part) for part in text.split("~"))
            values = [median * math.exp(sigma * z) for z in _normal_quantiles()]
        elif ":" in text:
            low, high = (float(part) for part in text.split(":"))
            if low > high:
                raise ValueError("a range falls")
            values = list(np.linspace(low, high, QUANTILES))
        else:
            values = [float(text)]
        whole = tuple(round(value) for value in values)
    except (ValueError, OverflowError) as error:
        raise LeanMoeError(
            f"{flag} is {text!r}: it must be like 1024, 512:2048 (even, rising), 1024~0.8 "
            "(log-normal: median and sigma) or a file with a length on each line"
        ) from error
    return _checked(text, whole, flag)


def _from_file(path: Path, flag: str) -> LengthDistribution:
    try:
        lines = path.read_text(encoding="utf-8-sig").split()
        return _checked(str(path), tuple(int(line) for line in lines), flag)
    except (OSError, UnicodeDecodeError) as error:
        raise LeanMoeError(f"{flag}: cannot read {path}: {error}") from error
    except ValueError as error:
        raise LeanMoeError(f"{flag}: {path} holds something that is no length: {error}") from error


def _checked(text: str, values: tuple[int, ...], flag: str) -> LengthDistribution:
    if not values or min(values) < 1 or max(values) > LONGEST:
        shown = "empty" if not values else f"{min(values)} to {max(values)}"
        raise LeanMoeError(f"{flag} is {text!r} ({shown}): lengths must be 1 to {LONGEST}")
    return LengthDistribution(text, values)


def _normal_quantiles() -> list[float]:
    from statistics import NormalDist

    return [NormalDist().inv_cdf((n + 0.5) / QUANTILES) for n in range(QUANTILES)]


@dataclass(frozen=True)
class ServiceLoadModel:
    """A closed loop of `concurrency` requests, or Poisson arrivals of `rate` a second."""

    inputs: LengthDistribution
    outputs: LengthDistribution
    concurrency: int | None = None
    rate: float | None = None
    step_tokens: int = STEP_TOKENS

    def check(self) -> None:
        """Raises LeanMoeError unless just one of the two is set, and in range."""
        if (self.concurrency is None) == (self.rate is None):
            raise LeanMoeError("give either --concurrency or --request-rate, just one of them")
        if self.concurrency is not None and self.concurrency < 1:
            raise LeanMoeError(f"--concurrency is {self.concurrency}: it must be 1 or more")
        if self.rate is not None and not self.rate > 0:
            raise LeanMoeError(f"--request-rate is {self.rate:g}: it must be above 0")
        if self.step_tokens < 16:
            raise LeanMoeError(f"--step-tokens is {self.step_tokens}: it must be at least 16")

    def __str__(self) -> str:
        many = (
            f"concurrency {self.concurrency}"
            if self.concurrency is not None
            else f"{self.rate:g} requests/s"
        )
        return f"{many}, {self.inputs.text} in, {self.outputs.text} out"
