"""Throughput and latency from token timestamps, under the names that `vllm bench serve` uses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

from leanmoe.errors import LeanMoeError


@dataclass(frozen=True)
class Load:
    """A closed loop: so many requests at once, each followed by the next as soon as it ends."""

    concurrency: int
    input_tokens: int
    output_tokens: int
    requests: int

    def check(self) -> None:
        """Raises LeanMoeError for the first number out of range."""
        for name, least in (("concurrency", 1), ("input_tokens", 1), ("output_tokens", 2)):
            if getattr(self, name) < least:
                raise LeanMoeError(f"{name} is {getattr(self, name)}: it must be {least} or more")
        if self.requests < self.concurrency:
            raise LeanMoeError(
                f"requests is {self.requests}: it must be at least the concurrency, "
                f"{self.concurrency}"
            )


@dataclass(frozen=True)
class Timeline:
    """When one request was sent and when each of its tokens came, in seconds."""

    sent: float
    tokens: tuple[float, ...]


@dataclass(frozen=True)
class Spread:
    """Mean and quantiles over requests, in milliseconds."""

    mean: float
    median: float
    p90: float
    p99: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Spread:
        """The spread of at least one value."""
        values = 1e3 * np.asarray(seconds)
        median, p90, p99 = np.quantile(values, [0.5, 0.9, 0.99])
        return cls(float(values.mean()), float(median), float(p90), float(p99))


@dataclass(frozen=True)
class Measurement:
    """One run of a load. TTFT: to the first token. TPOT: mean gap after it. E2EL: to the last."""

    duration: float
    request_throughput: float
    output_throughput: float
    total_token_throughput: float
    ttft_ms: Spread
    tpot_ms: Spread
    itl_ms: Spread
    e2el_ms: Spread

    @classmethod
    def of(cls, load: Load, timelines: Sequence[Timeline]) -> Measurement:
        """From every request's timeline; the duration is first sent to last token."""
        start = min(t.sent for t in timelines)
        duration = max(t.tokens[-1] for t in timelines) - start
        output = sum(len(t.tokens) for t in timelines)
        prompt = load.input_tokens * len(timelines)
        gaps = [b - a for t in timelines for a, b in zip(t.tokens, t.tokens[1:], strict=False)]
        return cls(
            duration=duration,
            request_throughput=len(timelines) / duration,
            output_throughput=output / duration,
            total_token_throughput=(output + prompt) / duration,
            ttft_ms=Spread.of([t.tokens[0] - t.sent for t in timelines]),
            tpot_ms=Spread.of(
                [(t.tokens[-1] - t.tokens[0]) / (len(t.tokens) - 1) for t in timelines]
            ),
            itl_ms=Spread.of(gaps),
            e2el_ms=Spread.of([t.tokens[-1] - t.sent for t in timelines]),
        )

    def to_json(self) -> dict[str, Any]:
        """The numbers under their names."""
        return asdict(self)


@dataclass(frozen=True)
class Ratio:
    """A variant's output throughput over the first variant's, paired by repeat."""

    median: float
    low: float
    high: float
    repeats: int

    @classmethod
    def of(cls, first: Sequence[float], other: Sequence[float], confidence: float = 0.95) -> Ratio:
        """The interval is Student's t on the logarithms of the paired ratios."""
        logs = np.log(np.asarray(other) / np.asarray(first))
        count = len(logs)
        if count < 2:
            raise LeanMoeError(f"{count} repeat: at least 2 are needed for an interval")
        reach = stats.t.ppf(0.5 + confidence / 2, count - 1) * logs.std(ddof=1) / math.sqrt(count)
        centre = float(logs.mean())
        return cls(
            float(np.exp(np.median(logs))),
            float(math.exp(centre - reach)),
            float(math.exp(centre + reach)),
            count,
        )

    def to_json(self) -> dict[str, Any]:
        """The numbers under their names."""
        return asdict(self)
