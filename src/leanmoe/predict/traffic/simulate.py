"""A service simulated event by event: arrivals, chunked prefill beside decoding, a full KV cache.

An event is the end of a step or an arrival. A step holds one token of every sequence that decodes
and parts of waiting prompts, first come first served, up to `step_tokens`. A request is let in when
its whole length fits the cache: nothing is ever evicted (engines that do can be better or worse).
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

import numpy as np

from leanmoe.core.errors import LeanMoeError
from leanmoe.predict.experts.curves import Activation
from leanmoe.predict.step.step_time import StepBatch, StepTime
from leanmoe.predict.traffic.service_load import ServiceLoadModel

GRAIN = 64
"""Contexts and parts of prompts are rounded to so many tokens, so that step times can be reused."""
ROUNDS = 4
"""Requests of a run, in multiples of the concurrency; metrics leave out a first round."""

FEWEST, MOST = 64, 4096
MOST_STEPS = 400_000


@dataclass
class SimulatedRequest:
    """One request on its way. Seconds since the start."""

    arrival: float
    inputs: int
    outputs: int
    read: int = 0
    """Tokens of its prompt that are in the cache."""
    made: int = 0
    first: float = math.nan
    end: float = math.nan

    @property
    def tpot(self) -> float:
        """Mean time of a token after the first."""
        return (self.end - self.first) / max(self.outputs - 1, 1)


@dataclass(frozen=True)
class Simulated:
    """What the requests after the first round got."""

    seconds: float
    output_throughput: float
    ttft: dict[str, float]
    tpot: dict[str, float]
    e2el: dict[str, float]
    requests: int
    steps: int
    running: float
    """Mean sequences in a step."""
    left: int
    """Requests under way when the last one arrived: above the service's rate they pile up."""


@dataclass
class _Engine:
    """The state of the service."""

    step: StepTime
    activation: Activation
    step_tokens: int
    room: float
    """Bytes of cache left."""
    clock: float = 0.0
    waiting: deque[SimulatedRequest] = field(default_factory=deque)
    reading: list[SimulatedRequest] = field(default_factory=list)
    decoding: list[SimulatedRequest] = field(default_factory=list)
    times: dict[tuple[int, int, int, int, int], float] = field(default_factory=dict)

    def bytes_of(self, request: SimulatedRequest) -> float:
        """Cache of a request at its full length, on the GPUs of its copy of attention."""
        here = self.step.deployment
        return (
            self.step.model.cached_bytes(request.inputs + request.outputs, here.tensor)
            / here.pipeline
            / here.data
        )

    def let_in(self) -> None:
        """Takes waiting requests while the cache has room."""
        while self.waiting and self.bytes_of(self.waiting[0]) <= self.room:
            request = self.waiting.popleft()
            self.room -= self.bytes_of(request)
            self.reading.append(request)

    def advance(self) -> list[SimulatedRequest]:
        """Runs one step; returns the requests that it finished."""
        left = self.step_tokens - len(self.decoding)
        parts: list[tuple[SimulatedRequest, int]] = []
        for request in self.reading:
            if left <= 0:
                break
            part = min(left, request.inputs - request.read)
            parts.append((request, part))
            left -= part
        self.clock += self._seconds(parts)
        done = [request for request in self.decoding if self._token(request)]
        for request, part in parts:
            request.read += part
            if request.read == request.inputs:
                self.reading.remove(request)
                self.decoding.append(request)
                if self._token(request):
                    done.append(request)
        for request in done:
            self.decoding.remove(request)
            self.room += self.bytes_of(request)
        return done

    def _token(self, request: SimulatedRequest) -> bool:
        request.made += 1
        if request.made == 1:
            request.first = self.clock
        if request.made >= request.outputs:
            request.end = self.clock
        return request.made >= request.outputs

    def _seconds(self, parts: list[tuple[SimulatedRequest, int]]) -> float:
        count = len(self.decoding)
        context = sum(r.inputs + r.made for r in self.decoding) / count if count else 0.0
        prompt = sum(part for _, part in parts)
        before = sum(r.read for r, _ in parts) / len(parts) if parts else 0.0
        ending = sum(r.read + part == r.inputs for r, part in parts)
        key = (count, round(context / GRAIN), -(-prompt // GRAIN), round(before / GRAIN), ending)
        if key not in self.times:
            batch = StepBatch(
                count, key[1] * GRAIN, min(prompt, key[2] * GRAIN), key[3] * GRAIN, ending
            )
            self.times[key] = self.step.parts(batch, self.activation).total
        return self.times[key]


def simulate(
    step: StepTime,
    activation: Activation,
    load: ServiceLoadModel,
    experts: float | None = None,
    requests: int | None = None,
    seed: int = 0,
) -> Simulated:
    """Runs the load until all its requests are served; the same seed gives the same run.

    Raises LeanMoeError where the weights or one of the requests do not fit, and where the run would
    not end.
    """
    load.check()
    draw = np.random.default_rng(seed)
    at_once = load.concurrency or 0
    count = requests or int(np.clip(ROUNDS * max(at_once, FEWEST), FEWEST, max(MOST, 2 * at_once)))
    inputs, outputs = load.inputs.draw(count, draw), load.outputs.draw(count, draw)
    arrivals = np.zeros(count)
    if load.rate is not None:
        arrivals = np.cumsum(draw.exponential(1 / load.rate, size=count))
    every = [
        SimulatedRequest(float(arrival), int(i), int(o))
        for arrival, i, o in zip(arrivals, inputs, outputs, strict=True)
    ]
    memory = step.deployment.memory(step.model, experts)
    engine = _Engine(step, activation, load.step_tokens, memory.cache)
    longest = max(every, key=lambda r: r.inputs + r.outputs)
    if engine.bytes_of(longest) > engine.room:
        raise LeanMoeError(
            f"one request of {longest.inputs + longest.outputs} tokens does not fit the KV cache "
            f"of {step.deployment}: {memory.cache / 1e9:.1f} GB are left"
        )
    return _run(engine, every, load)


def _run(engine: _Engine, every: list[SimulatedRequest], load: ServiceLoadModel) -> Simulated:
    coming = deque(every)
    done: list[SimulatedRequest] = []
    steps, sequences, left = 0, 0, 0
    while len(done) < len(every):
        active = len(engine.waiting) + len(engine.reading) + len(engine.decoding)
        while coming and _has_arrived(coming[0], engine.clock, active, load):
            request = coming.popleft()
            if load.rate is None:
                request.arrival = engine.clock
            engine.waiting.append(request)
            active += 1
            left = active if not coming else left
        engine.let_in()
        if not engine.reading and not engine.decoding:
            engine.clock = coming[0].arrival
            continue
        done += engine.advance()
        steps += 1
        sequences += len(engine.decoding)
        if steps > MOST_STEPS:
            raise LeanMoeError(
                f"the load takes more than {MOST_STEPS} steps to simulate: lower --num-prompts or "
                "the lengths"
            )
    return _metrics(done, steps, sequences, left, load)


def _has_arrived(
    request: SimulatedRequest, clock: float, active: int, load: ServiceLoadModel
) -> bool:
    if load.concurrency is not None:
        return active < load.concurrency
    return request.arrival <= clock


def _metrics(
    done: list[SimulatedRequest], steps: int, sequences: int, left: int, load: ServiceLoadModel
) -> Simulated:
    """Over the requests after the first round, while as many as the load says are under way."""
    first = min(load.concurrency or len(done) // ROUNDS, len(done) // 2)
    ordered = sorted(done, key=lambda r: r.end)
    counted = ordered[first:]
    last = len(ordered) - 1 - (load.concurrency or 0) if load.concurrency else len(ordered) - 1
    low, high = ordered[first - 1].end if first else 0.0, ordered[max(last, first)].end
    tokens = sum(_tokens_between(r, low, high) for r in done)
    return Simulated(
        ordered[-1].end,
        tokens / max(high - low, 1e-9),
        _summary([r.first - r.arrival for r in counted]),
        _summary([r.tpot for r in counted]),
        _summary([r.end - r.arrival for r in counted]),
        len(done),
        steps,
        sequences / steps,
        left,
    )


def _tokens_between(request: SimulatedRequest, low: float, high: float) -> float:
    """Output tokens of a request that fell between two moments, at its own mean pace."""
    if request.end <= request.first:
        return float(request.outputs) if low < request.end <= high else 0.0
    inside = max(0.0, min(request.end, high) - max(request.first, low))
    return request.outputs * inside / (request.end - request.first)


def _summary(values: list[float]) -> dict[str, float]:
    seconds = np.array(values)
    return {
        "mean": float(seconds.mean()),
        "median": float(np.median(seconds)),
        "p90": float(np.quantile(seconds, 0.9)),
        "p99": float(np.quantile(seconds, 0.99)),
    }
