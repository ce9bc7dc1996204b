"""The sweep: every variant at every load, interleaved, each run stored as soon as it is done."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from leanmoe.bench.metrics import Measurement, Timeline
from leanmoe.bench.prompts import Request, Supply
from leanmoe.bench.record import Record
from leanmoe.bench.settings import BenchSettings, ServiceLoad
from leanmoe.core.progress import bar

WARM_UP_OUTPUT = 4
MOST_WARM_UP = 64


@dataclass(frozen=True)
class Outcome:
    """What one run brought: the requests that completed, and how many did not."""

    timelines: Sequence[Timeline]
    failed: int = 0


RunOne = Callable[[str, ServiceLoad, Sequence[Request], str], Outcome]
"""Runs one variant under a load; the last argument seeds the arrivals of an open loop."""


class Runner(Protocol):
    """Something that can run a load on several variants."""

    restarts: bool
    """Whether a change of variant is so slow that variants take turns by repeat, not by run."""

    def describe(self) -> dict[str, Any]:
        """What runs, on what."""
        ...

    def variants(self) -> list[dict[str, Any]]:
        """Each variant's name and what it is; the first is what the others are compared with."""
        ...

    def at(self, load: ServiceLoad) -> AbstractContextManager[RunOne]:
        """Sets up for one load."""
        ...

    def routing(self, load: ServiceLoad, run_one: RunOne) -> dict[str, Any]:
        """What each variant's router does at the load, where it can be seen."""
        ...

    def close(self) -> None:
        """Ends what `at` or a run started and left running."""
        ...


def sweep(
    runner: Runner,
    supply: Supply,
    settings: BenchSettings,
    record: Record,
    shown: Callable[[ServiceLoad], None],
) -> None:
    """Runs everything, load by load; in each repeat the variants take turns in a new order.

    Whatever ends the sweep early is written into the record as the reason, and raised.
    """
    rng = random.Random(settings.seed)
    try:
        if runner.restarts:
            _by_repeat(runner, supply, settings, record, rng)
            for load in settings.loads():
                shown(load)
        else:
            for load in settings.loads():
                _one_load(runner, supply, settings, record, load, rng)
                shown(load)
    except BaseException as error:
        record.stop(reason_for(error))
        raise
    finally:
        runner.close()
    record.finish()


def _one_load(
    runner: Runner,
    supply: Supply,
    settings: BenchSettings,
    record: Record,
    load: ServiceLoad,
    rng: random.Random,
) -> None:
    names = record.names
    total = len(names) * (settings.repeats + 1)
    with runner.at(load) as run_one, bar(f"Load, {load.name}", total, "runs") as advance:
        few = warm_up(supply, load)
        for name in names:  # memory, kernels and connections of every variant are warm
            run_one(name, _closed(load, len(few)), few, "warm")
            advance(1)
        for repeat in range(settings.repeats):
            requests = supply.draw(load, repeat)
            for name in rng.sample(names, len(names)):
                outcome = run_one(name, load, requests, f"{settings.seed} {load.name} {repeat}")
                record.add(load, name, repeat, measured(outcome, load, settings))
                advance(1)
        record.add_routing(load, runner.routing(load, run_one))
        record.save()


def _by_repeat(
    runner: Runner, supply: Supply, settings: BenchSettings, record: Record, rng: random.Random
) -> None:
    names, loads = record.names, settings.loads()
    total = settings.repeats * len(names) * len(loads)
    with bar("Loads, restarting", total, "runs") as advance:
        for repeat in range(settings.repeats):
            for name in rng.sample(names, len(names)):
                for load in loads:
                    with runner.at(load) as run_one:
                        few = warm_up(supply, load)
                        run_one(name, _closed(load, len(few)), few, "warm")
                        requests = supply.draw(load, repeat)
                        seed = f"{settings.seed} {load.name} {repeat}"
                        outcome = run_one(name, load, requests, seed)
                    record.add(load, name, repeat, measured(outcome, load, settings))
                    advance(1)


def measured(outcome: Outcome, load: ServiceLoad, settings: BenchSettings) -> Measurement:
    """The figures of one run."""
    return Measurement.of(
        outcome.timelines,
        outcome.failed,
        settings.goodput_limits(),
        is_open=load.rate is not None,
    )


def warm_up(supply: Supply, load: ServiceLoad) -> list[Request]:
    """A few requests with short replies, as many as run together."""
    count = min(load.concurrency or MOST_WARM_UP, load.requests)
    return [
        Request(request.prompt, min(WARM_UP_OUTPUT, request.output_tokens))
        for request in supply.draw(load, "warm", count)
    ]


def _closed(load: ServiceLoad, requests: int) -> ServiceLoad:
    return ServiceLoad(requests, concurrency=load.concurrency or requests)


def reason_for(error: BaseException) -> str:
    """Why a sweep ended early, in one line."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
