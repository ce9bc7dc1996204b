"""The one interleaved comparer: variants run the same load, each repeat in a new order.

A machine grows warm and slow over minutes. Runs of one variant after the other would call that a
gain, so each repeat runs every variant once, and ratios are of runs of the same repeat. `tune`
compares plans in this process with `compare`; `leanmoe bench` sweeps loads over any engine
(`sweep`). Both take `interleaved`'s order, and warm every variant up by `warm_up`'s requests.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from leanmoe.bench.metrics import ClosedLoop, Measurement, Request
from leanmoe.core.errors import LeanMoeError
from leanmoe.core.progress import bar
from leanmoe.stats.ratios import Ratio

WARM_UP_OUTPUT = 4
"""Tokens of a reply that only warms up."""

PromptSupply = Callable[[int | str, int], Sequence[Request]]
"""Gives the requests of a repeat, or of "warm", and so many of them: the same for every variant."""


@dataclass(frozen=True)
class Variant:
    """Something to run the load on: a context that sets the model up, and what to call it."""

    name: str
    context: Callable[[], AbstractContextManager[Any]]
    repeats: int | None = None
    """The repeats it takes part in, the first ones; None for all. For what takes long."""


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
    supply: PromptSupply,
    load: ClosedLoop,
    variants: Sequence[Variant],
    repeats: int = 5,
    seed: int = 0,
) -> Comparison:
    """Runs `load` on every variant `repeats` times through continuous batching in this process.

    Decoding is greedy and never stops early, so that every variant makes the same number of
    tokens. Raises LeanMoeError when the model cannot be served this way, or a request fails.
    """
    from leanmoe.bench.continuous import Arrivals, Room, run, served  # torch, which HTTP needs not

    load.check()
    wanted = {v.name: repeats if v.repeats is None else min(v.repeats, repeats) for v in variants}
    contexts = {variant.name: variant.context for variant in variants}
    runs: dict[str, list[Measurement]] = {name: [] for name in wanted}
    room = Room(load.concurrency, load.input_tokens, load.input_tokens + load.output_tokens)
    title, total = f"Load, concurrency {load.concurrency}", len(wanted) + sum(wanted.values())
    with served(model, room, load.output_tokens) as manager, bar(title, total, "runs") as advance:

        def run_one(name: str, requests: Sequence[Request]) -> Measurement:
            with contexts[name]():
                timelines = run(manager, requests, Arrivals(load.concurrency))
            advance(1)
            return Measurement.of(timelines)

        for name in wanted:  # memory, kernels and caches of every variant are warm
            run_one(name, warm_up(supply, load.concurrency))
        for repeat, name in interleaved(wanted, random.Random(seed)):
            runs[name].append(run_one(name, supply(repeat, load.requests)))
    return Comparison(load, {name: tuple(measured) for name, measured in runs.items()})


def interleaved(repeats: Mapping[str, int], rng: random.Random) -> Iterator[tuple[int, str]]:
    """Each repeat's number and a variant's name: all that take part in the repeat, shuffled."""
    for repeat in range(max(repeats.values(), default=0)):
        taking_part = [name for name, count in repeats.items() if repeat < count]
        for name in rng.sample(taking_part, len(taking_part)):
            yield repeat, name


def warm_up(supply: PromptSupply, count: int) -> list[Request]:
    """`count` requests with short replies, which are run before anything is timed."""
    return [
        Request(request.prompt, min(WARM_UP_OUTPUT, request.output_tokens))
        for request in supply("warm", count)
    ]


def same_prompts(prompts: Sequence[Sequence[int]], load: ClosedLoop) -> PromptSupply:
    """A supply that sends the same prompts in every repeat, cut to the load's input length.

    Raises LeanMoeError when there is no prompt, or one is shorter than the load's.
    """
    cut = [tuple(prompt[: load.input_tokens]) for prompt in prompts]
    shortest = min(map(len, cut), default=0)
    if shortest < load.input_tokens:
        given = f"a prompt of {shortest} tokens" if cut else "no prompt"
        raise LeanMoeError(f"{given} was given: the load needs prompts of {load.input_tokens}")
    return lambda _repeat, count: [
        Request(cut[n % len(cut)], load.output_tokens) for n in range(count)
    ]
