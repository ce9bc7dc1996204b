"""The sweep: every variant at every load, interleaved; each run is stored as soon as it is done."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from leanmoe.bench.measurement import Measurement, Request, Timeline, interleaved, warm_up
from leanmoe.bench.prompts import Supply
from leanmoe.bench.record import Record
from leanmoe.bench.settings import BenchSettings, ServiceLoad
from leanmoe.core.progress import bar

MOST_WARM_UP = 64
"""Requests that warm an open loop up, at most."""


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
    """Whether a change of variant is so slow that variants alternate by repeat, not by run."""

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
    """Runs every variant at every load; each repeat draws prompts of its own.

    Where a change of variant is quick, load follows load, and variants alternate within a load. An
    engine that restarts runs all loads before the next variant. `shown` is called
    when a load is done. Whatever ends the sweep early is written into the record as the reason, and
    raised.
    """
    run = _Sweep(runner, supply, settings, record, random.Random(settings.seed))
    try:
        if runner.restarts:
            run.restarting()
            for load in settings.loads():
                shown(load)
        else:
            for load in settings.loads():
                run.one_load(load)
                shown(load)
    except BaseException as error:
        record.stop(reason_for(error))
        raise
    finally:
        runner.close()
    record.finish()


@dataclass(frozen=True)
class _Sweep:
    """What every run of a sweep needs."""

    runner: Runner
    supply: Supply
    settings: BenchSettings
    record: Record
    rng: random.Random

    def one_load(self, load: ServiceLoad) -> None:
        """All runs of a load, then what its router does."""
        names, record = self._repeats(), self.record
        total = len(names) * (self.settings.repeats + 1)
        with self.runner.at(load) as run_one, bar(f"Load, {load.name}", total, "runs") as advance:
            for name in names:  # memory, kernels and connections of every variant are warm
                self._warm_up(run_one, load, name)
                advance(1)
            for repeat, name in interleaved(names, self.rng):
                self._timed(run_one, load, name, repeat)
                advance(1)
            record.add_routing(load, self.runner.routing(load, run_one))
            record.save()

    def restarting(self) -> None:
        """All loads on a variant, then on the next one."""
        names, loads = self._repeats(), self.settings.loads()
        total = self.settings.repeats * len(names) * len(loads)
        with bar("Loads, restarting", total, "runs") as advance:
            for repeat, name in interleaved(names, self.rng):
                for load in loads:
                    with self.runner.at(load) as run_one:
                        self._warm_up(run_one, load, name)
                        self._timed(run_one, load, name, repeat)
                    advance(1)

    def _repeats(self) -> dict[str, int]:
        return dict.fromkeys(self.record.names, self.settings.repeats)

    def _warm_up(self, run_one: RunOne, load: ServiceLoad, name: str) -> None:
        few = few_requests(self.supply, load)
        closed = ServiceLoad(len(few), concurrency=load.concurrency or len(few))
        run_one(name, closed, few, "warm")

    def _timed(self, run_one: RunOne, load: ServiceLoad, name: str, repeat: int) -> None:
        seed = f"{self.settings.seed} {load.name} {repeat}"
        outcome = run_one(name, load, self.supply.draw(load, repeat), seed)
        self.record.add(load, name, repeat, measured(outcome, load, self.settings))


def measured(outcome: Outcome, load: ServiceLoad, settings: BenchSettings) -> Measurement:
    """The figures of one run."""
    return Measurement.of(
        outcome.timelines,
        outcome.failed,
        settings.goodput_limits(),
        is_open=load.rate is not None,
    )


def few_requests(supply: Supply, load: ServiceLoad) -> list[Request]:
    """The requests of a warm-up: as many as run at the same time, with short replies."""
    return warm_up(partial(supply.draw, load), min(load.concurrency or MOST_WARM_UP, load.requests))


def reason_for(error: BaseException) -> str:
    """Why a sweep ended early, in one line."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
