"""Throughput and latency from token timestamps, under the names of `vllm bench serve`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from leanmoe.core.errors import LeanMoeError

LATENCIES = ("ttft", "tpot", "itl", "e2el")
"""In the order `vllm bench serve` prints them."""


@dataclass(frozen=True)
class Request:
    """One request: its prompt's token ids and how many tokens the reply has."""

    prompt: tuple[int, ...]
    output_tokens: int

    @property
    def tokens(self) -> int:
        """Tokens of prompt and reply."""
        return len(self.prompt) + self.output_tokens


@dataclass(frozen=True)
class Timeline:
    """When one request was sent and when its tokens came, in seconds."""

    sent: float
    tokens: tuple[float, ...]
    """When each token came; over HTTP each piece of the stream, which may hold several."""
    input_tokens: int
    output_tokens: int
    """Counted by the engine."""
    delay: float = 0.0
    """Seconds from when an open loop meant to send it to when it was sent."""
    asked_tokens: int | None = None
    """Tokens that the reply was asked to have, where it might have fewer."""

    @property
    def is_short(self) -> bool:
        """Whether the reply ended before what was asked for."""
        return self.asked_tokens is not None and self.output_tokens < self.asked_tokens

    @property
    def ttft(self) -> float:
        """Time to first token."""
        return self.tokens[0] - self.sent

    @property
    def tpot(self) -> float:
        """Time per output token after the first; 0 for a reply of one token, as vLLM has it."""
        return (self.tokens[-1] - self.tokens[0]) / max(self.output_tokens - 1, 1)

    @property
    def e2el(self) -> float:
        """End-to-end latency: to the last token."""
        return self.tokens[-1] - self.sent

    @property
    def gaps(self) -> list[float]:
        """Between one piece of the stream and the next: inter-token latency."""
        return [b - a for a, b in zip(self.tokens, self.tokens[1:], strict=False)]


@dataclass(frozen=True)
class Spread:
    """Mean, standard deviation and quantiles over requests, in milliseconds."""

    mean: float
    median: float
    p90: float
    p99: float
    std: float = 0.0

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Spread:
        """The spread of the values; of none, zeros, as `vllm bench serve` has it."""
        values = 1e3 * np.asarray(seconds or [0.0])
        median, p90, p99 = np.quantile(values, [0.5, 0.9, 0.99])
        return cls(float(values.mean()), float(median), float(p90), float(p99), float(values.std()))


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
    completed: int
    failed: int
    total_input_tokens: int
    total_output_tokens: int
    request_goodput: float | None = None
    """Requests a second that kept every limit; None where no limit was given."""
    delay_ms: Spread | None = None
    """How late an open loop sent its requests; None for a closed loop."""
    short_replies: int = 0
    """Requests whose reply ended before what was asked for."""

    @classmethod
    def of(
        cls,
        timelines: Sequence[Timeline],
        failed: int = 0,
        goodput: Mapping[str, float] | None = None,
        is_open: bool = False,
    ) -> Measurement:
        """From every completed request's timeline; the duration is first sent to last token.

        `goodput` holds limits in milliseconds by the names "ttft", "tpot" and "e2el" (DistServe,
        arXiv 2401.09670). Raises LeanMoeError when no request completed.
        """
        if not timelines:
            raise LeanMoeError(f"no request was completed, {failed} failed: nothing was measured")
        start = min(t.sent for t in timelines)
        duration = max(t.tokens[-1] for t in timelines) - start
        output = sum(t.output_tokens for t in timelines)
        prompt = sum(t.input_tokens for t in timelines)
        good = sum(_keeps(t, goodput) for t in timelines) if goodput else None
        return cls(
            duration=duration,
            request_throughput=len(timelines) / duration,
            output_throughput=output / duration,
            total_token_throughput=(output + prompt) / duration,
            ttft_ms=Spread.of([t.ttft for t in timelines]),
            tpot_ms=Spread.of([t.tpot for t in timelines if t.output_tokens > 1]),
            itl_ms=Spread.of([gap for t in timelines for gap in t.gaps]),
            e2el_ms=Spread.of([t.e2el for t in timelines]),
            completed=len(timelines),
            failed=failed,
            total_input_tokens=prompt,
            total_output_tokens=output,
            request_goodput=None if good is None else good / duration,
            delay_ms=Spread.of([t.delay for t in timelines]) if is_open else None,
            short_replies=sum(t.is_short for t in timelines),
        )

    def to_json(self) -> dict[str, Any]:
        """The numbers under their names."""
        return asdict(self)

    def to_vllm_json(self) -> dict[str, Any]:
        """The numbers as the result file of `vllm bench serve` names them: `median_ttft_ms`."""
        flat = {
            name: value
            for name, value in asdict(self).items()
            if value is not None and not isinstance(value, dict)
        }
        for name in (*LATENCIES, "delay"):
            spread: Spread | None = getattr(self, f"{name}_ms")
            for statistic, value in asdict(spread).items() if spread else ():
                flat[f"{statistic}_{name}_ms"] = value
        return flat


def _keeps(timeline: Timeline, limits: Mapping[str, float]) -> bool:
    return all(1e3 * float(getattr(timeline, name)) <= most for name, most in limits.items())
