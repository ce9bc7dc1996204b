"""One closed loop of equal requests on several variants of a model, as the tune job measures it."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from leanmoe.bench.continuous import Arrivals, Room, run, served
from leanmoe.bench.metrics import ClosedLoop, Measurement
from leanmoe.bench.prompts import Request
from leanmoe.core.errors import LeanMoeError
from leanmoe.core.progress import bar
from leanmoe.stats.ratios import Ratio

WARM_UP_OUTPUT = 4


@dataclass(frozen=True)
class Variant:
    """Something to run the load on: a context that sets the model up, and what to call it."""

    name: str
    context: Callable[[], AbstractContextManager[Any]]
    repeats: int | None = None
    """At most so many of the repeats: for what only stands beside, and takes long."""


@dataclass(frozen=True)
class Comparison:
    """The same load on several variants, interleaved."""

    load: ClosedLoop
    runs: Mapping[str, tuple[Measurement, ...]]

    def ratio(self, name: str, confidence: float = 0.95) -> Ratio:
        """Output throughput of variant `name` over the first variant's."""
        first = next(iter(self.runs.values()))
        return Ratio.of(
            [run.output_throughput for run in first],
            [run.output_throughput for run in self.runs[name]],
            confidence,
        )

    def median_run(self, name: str) -> Measurement:
        """The run of median throughput."""
        runs = sorted(self.runs[name], key=lambda run: run.output_throughput)
        return runs[len(runs) // 2]

    def to_json(self) -> dict[str, Any]:
        """The load, each variant's median run and all its throughputs."""
        return {
            "concurrency": self.load.concurrency,
            "input_tokens": self.load.input_tokens,
            "output_tokens": self.load.output_tokens,
            "requests": self.load.requests,
            "variants": {
                name: {
                    **self.median_run(name).to_json(),
                    "runs": [run.output_throughput for run in runs],
                }
                for name, runs in self.runs.items()
            },
            "label": "measured",
        }


def compare(
    model: Any,
    prompts: Sequence[Sequence[int]],
    load: ClosedLoop,
    variants: Sequence[Variant],
    repeats: int = 5,
    seed: int = 0,
) -> Comparison:
    """Runs `load` on every variant `repeats` times, in an order drawn anew for each repeat.

    Requests take `prompts` in turn, cut to the load's input length; decoding is greedy and never
    stops early, so that every variant makes the same number of tokens. Raises LeanMoeError when
    a prompt is too short, the model cannot be served this way, or a request fails.
    """
    load.check()
    cut = [tuple(prompt[: load.input_tokens]) for prompt in prompts]
    shortest = min(map(len, cut), default=0)
    if shortest < load.input_tokens:
        given = f"a prompt of {shortest} tokens" if cut else "no prompt"
        raise LeanMoeError(f"{given} was given: the load needs prompts of {load.input_tokens}")
    order = random.Random(seed)
    runs: dict[str, list[Measurement]] = {variant.name: [] for variant in variants}
    what = f"Load, {load.concurrency} at once"
    wanted = {v.name: repeats if v.repeats is None else min(v.repeats, repeats) for v in variants}
    total = len(variants) + sum(wanted.values())
    room = Room(load.concurrency, load.input_tokens, load.input_tokens + load.output_tokens)
    requests = [Request(cut[n % len(cut)], load.output_tokens) for n in range(load.requests)]
    few = [Request(cut[n % len(cut)], WARM_UP_OUTPUT) for n in range(load.concurrency)]
    arrivals = Arrivals(load.concurrency)
    with served(model, room, load.output_tokens) as manager, bar(what, total, "runs") as advance:
        for variant in variants:  # memory, kernels and caches of every variant are warm
            with variant.context():
                run(manager, few, arrivals)
            advance(1)
        for repeat in range(repeats):
            taking_part = [variant for variant in variants if repeat < wanted[variant.name]]
            for variant in order.sample(taking_part, len(taking_part)):
                with variant.context():
                    timelines = run(manager, requests, arrivals)
                runs[variant.name].append(Measurement.of(timelines))
                advance(1)
    return Comparison(load, {name: tuple(found) for name, found in runs.items()})
