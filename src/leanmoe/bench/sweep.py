"""The sweep: every variant at every load, interleaved; the file is whole after every run."""

from __future__ import annotations

import hashlib
import json
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from leanmoe.bench.comparison import busy_machine, interleaved
from leanmoe.bench.measurement import Measurement, Request, Timeline
from leanmoe.bench.prompts import Supply
from leanmoe.bench.settings import BenchSettings, ServiceLoad
from leanmoe.core.files import write_json
from leanmoe.core.progress import bar
from leanmoe.plan import Plan
from leanmoe.results.bench import THROUGHPUT, TPOT, BenchResults
from leanmoe.stats.runs import Ratio

COMPARED = (
    "output_throughput",
    "request_throughput",
    "request_goodput",
    "median_ttft_ms",
    "median_tpot_ms",
    "median_e2el_ms",
)
"""What a variant is compared with the first one in, paired by repeat."""
MOST_BESIDE = 3
"""Repeats that a variant takes part in which only stands beside the others."""
WARM_UP_OUTPUT = 4
"""Tokens of a reply that only warms up."""
MOST_WARM_UP = 64
"""Requests that warm an open loop up, at most."""
LENGTH_TOLERANCE = 0.01
"""Largest relative difference of mean reply lengths at which runs are of the same work."""


@dataclass(frozen=True)
class Outcome:
    """What one run brought: the requests that completed, and how many did not."""

    timelines: Sequence[Timeline]
    failed: int = 0
    reason: str | None = None
    """Why one of them failed, in the server's words."""


RunOne = Callable[[str, ServiceLoad, Sequence[Request], str], Outcome]
"""Runs one variant under a load; the last argument seeds the arrivals of an open loop."""


class Runner(Protocol):
    """Something that can run a load on several variants."""

    restarts: bool
    """Whether a change of variant is so slow that variants alternate by repeat, not by run."""
    beside: frozenset[str]
    """Variants whose gain need not be precise: a few of the repeats are enough."""

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


class Record:
    """Gathers runs and writes them under `path` as they come; without one it only gathers."""

    def __init__(
        self,
        path: Path | None,
        settings: BenchSettings,
        variants: Sequence[Mapping[str, Any]],
        about: Mapping[str, Any],
    ) -> None:
        """`variants` are described by dictionaries with a "name"; `about` is what ran, on what."""
        self.path = path
        self.names = tuple(str(variant["name"]) for variant in variants)
        self._settings, self._about = settings, dict(about)
        self._variants = [dict(variant) for variant in variants]
        self._runs: dict[ServiceLoad, dict[str, dict[int, Measurement]]] = {}
        self._routing: dict[ServiceLoad, dict[str, Any]] = {}
        self._stopped: str | None = "the bench is still running, or was killed"
        self.notes: list[str] = []

    def add(self, load: ServiceLoad, name: str, repeat: int, measured: Measurement) -> None:
        """Stores one run and writes the file."""
        runs = self._runs.setdefault(load, {each: {} for each in self.names})
        runs[name][repeat] = measured
        self.save()

    def add_routing(self, load: ServiceLoad, routing: Mapping[str, Any]) -> None:
        """Stores what each variant's router did at a load."""
        self._routing[load] = dict(routing)

    def note(self, line: str) -> None:
        """Stores a remark, once."""
        if line not in self.notes:
            self.notes.append(line)

    def finish(self) -> None:
        """Everything that was asked for was measured."""
        self._stopped = None
        self.save()

    def stop(self, reason: str) -> None:
        """The bench ends here: what was measured stays, marked incomplete."""
        self._stopped = reason
        self.save()

    @property
    def is_empty(self) -> bool:
        """Whether nothing was measured."""
        return not self._runs

    def save(self) -> None:
        """Writes the file, whole or not at all."""
        if self.path is not None:
            write_json(self.path, self.to_json())

    def runs(self, load: ServiceLoad) -> Mapping[str, Mapping[int, Measurement]]:
        """The runs of one load so far, by variant and repeat."""
        return self._runs[load]

    def is_precise(self, load: ServiceLoad, repeats: int, names: Sequence[str]) -> bool:
        """Whether the load needs no more than so many repeats, by the gains of `names`."""
        looks = self._settings.looks
        if repeats not in looks.numbers:
            return False
        figure, gains = THROUGHPUT if load.rate is None else TPOT, self.entry(load)["gain"]
        ratios = [Ratio(**gains[name][figure]) for name in names if figure in gains.get(name, {})]
        return looks.are_enough(repeats, ratios)

    def to_json(self) -> dict[str, Any]:
        """All of it."""
        return {
            BenchResults.KIND: BenchResults.VERSION,
            "complete": self._stopped is None,
            "stopped": self._stopped,
            **self._about,
            "variants": self._variants,
            "settings": self._settings.to_json(),
            "loads": [self.entry(load) for load in self._runs],
            "notes": self.notes,
        }

    def entry(self, load: ServiceLoad) -> dict[str, Any]:
        """One load: every run, the medians over repeats, and the gain over the first variant."""
        runs = {
            name: {repeat: each.to_vllm_json() for repeat, each in found.items()}
            for name, found in self._runs[load].items()
        }
        return {
            **load.to_json(),
            "label": "measured",
            "runs": {
                name: [{"repeat": repeat, **run} for repeat, run in sorted(found.items())]
                for name, found in runs.items()
            },
            "median": {name: medians(list(found.values())) for name, found in runs.items()},
            "gain": {
                name: found
                for name in self.names[1:]
                if (found := self._gain(runs[self.names[0]], runs[name]))
            },
            "routing": self._routing.get(load, {}),
        }

    def _gain(
        self, first: Mapping[int, Mapping[str, Any]], other: Mapping[int, Mapping[str, Any]]
    ) -> dict[str, Any]:
        both = sorted(set(first) & set(other))
        if len(both) < 2:
            return {}
        if other_lengths([(first[n], other[n]) for n in both]):
            return {}
        found = {}
        for figure in COMPARED:
            pairs = [(first[n].get(figure), other[n].get(figure)) for n in both]
            if all(a and b for a, b in pairs):
                ratio = self._settings.looks.ratio(
                    [float(a) for a, _ in pairs if a], [float(b) for _, b in pairs if b]
                )
                found[figure] = ratio.to_json()
        return found


def other_lengths(pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> bool:
    """Whether replies ended before what was asked for, and so differ in length within a pair.

    A server that writes less is done sooner: that is no gain.
    """

    def mean(run: Mapping[str, Any]) -> float:
        return float(run["total_output_tokens"]) / float(run["completed"])

    return any(
        (one.get("short_replies") or two.get("short_replies"))
        and abs(mean(one) / mean(two) - 1) > LENGTH_TOLERANCE
        for one, two in pairs
    )


def medians(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Each figure's median over the repeats."""
    if not runs:
        return {}
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def plan_sha256(plan: Plan) -> str:
    """The first digits of a plan's digest, by which results tell plans apart."""
    return hashlib.sha256(json.dumps(plan.to_json(), sort_keys=True).encode()).hexdigest()[:16]


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
    run = Sweep(runner, supply, settings, record, random.Random(settings.seed))
    try:
        if runner.restarts:
            run.restarting()
            for load in settings.loads():
                shown(load)
        else:
            for load in settings.loads():
                run.one_load(load, is_watched=True)
                shown(load)
    except BaseException as error:
        record.stop(reason_for(error))
        raise
    finally:
        runner.close()
    record.finish()


@dataclass(frozen=True)
class Sweep:
    """What every run of a sweep needs."""

    runner: Runner
    supply: Supply
    settings: BenchSettings
    record: Record
    rng: random.Random

    def one_load(self, load: ServiceLoad, is_watched: bool = False) -> None:
        """All runs of a load; then, if it is watched, what its router does."""
        repeats, record = self._repeats(), self.record
        if busy := busy_machine(f"before the load of {load.name}"):
            record.note(busy)
        total = len(repeats) + sum(repeats.values())
        with self.runner.at(load) as run_one, bar(f"Load, {load.name}", total, "runs") as advance:
            for name in repeats:  # memory, kernels and connections of every variant are warm
                self._warm_up(run_one, load, name)
                advance(1)
            for repeat, name in interleaved(repeats, self.rng, partial(self._is_precise, load)):
                self._timed(run_one, load, name, repeat)
                advance(1)
            if is_watched:
                record.add_routing(load, self.runner.routing(load, run_one))
                record.save()

    def restarting(self) -> None:
        """All loads on a variant, then on the next one."""
        repeats, loads = self._repeats(), self.settings.loads()

        def are_precise(count: int) -> bool:
            return all(self._is_precise(load, count) for load in loads)

        with bar("Loads, restarting", sum(repeats.values()) * len(loads), "runs") as advance:
            for repeat, name in interleaved(repeats, self.rng, are_precise):
                for load in loads:
                    with self.runner.at(load) as run_one:
                        self._warm_up(run_one, load, name)
                        self._timed(run_one, load, name, repeat)
                    advance(1)

    def _repeats(self) -> dict[str, int]:
        most, beside = self.settings.repeats, self.runner.beside
        few = min(most, MOST_BESIDE)
        return {name: few if name in beside else most for name in self.record.names}

    def _is_precise(self, load: ServiceLoad, repeats: int) -> bool:
        names = [name for name in self.record.names[1:] if name not in self.runner.beside]
        return self.record.is_precise(load, repeats, names)

    def _warm_up(self, run_one: RunOne, load: ServiceLoad, name: str) -> None:
        few = few_requests(self.supply, load)
        closed = ServiceLoad(len(few), concurrency=load.concurrency or len(few))
        run_one(name, closed, few, "warm")

    def _timed(self, run_one: RunOne, load: ServiceLoad, name: str, repeat: int) -> None:
        seed = f"{self.settings.seed} {load.name} {repeat}"
        outcome = run_one(name, load, self.supply.draw(load, repeat), seed)
        if outcome.reason:
            self.record.note(f"{name}: {outcome.failed} requests failed: {outcome.reason}")
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
    count = min(load.concurrency or MOST_WARM_UP, load.requests)
    return [
        Request(request.prompt, min(WARM_UP_OUTPUT, request.output_tokens))
        for request in supply.draw(load, "warm", count)
    ]


def reason_for(error: BaseException) -> str:
    """Why a sweep ended early, in one line."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
