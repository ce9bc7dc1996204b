"""What a bench has measured so far: a file that is whole after every run, complete or not."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from leanmoe.bench.measurement import Measurement
from leanmoe.bench.settings import BenchSettings, ServiceLoad
from leanmoe.core.files import write_json
from leanmoe.plan import Plan
from leanmoe.results.bench import BenchResults
from leanmoe.stats.paired import Ratio

COMPARED = (
    "output_throughput",
    "request_throughput",
    "request_goodput",
    "median_ttft_ms",
    "median_tpot_ms",
    "median_e2el_ms",
)
"""What a variant is compared with the first one in, paired by repeat."""


class Record:
    """Gathers runs and writes them under `path` as they come."""

    def __init__(
        self,
        path: Path,
        settings: BenchSettings,
        variants: Sequence[Mapping[str, Any]],
        about: Mapping[str, Any],
    ) -> None:
        """`variants` are described by dictionaries with a "name"; `about` is what ran, on what."""
        self.path = path
        self.names = tuple(str(variant["name"]) for variant in variants)
        self._settings, self._about = settings, dict(about)
        self._variants = [dict(variant) for variant in variants]
        self._runs: dict[ServiceLoad, dict[str, dict[int, dict[str, Any]]]] = {}
        self._routing: dict[ServiceLoad, dict[str, Any]] = {}
        self._stopped: str | None = "the bench is still running, or was killed"
        self.notes: list[str] = []

    def add(self, load: ServiceLoad, name: str, repeat: int, measured: Measurement) -> None:
        """Stores one run and writes the file."""
        runs = self._runs.setdefault(load, {each: {} for each in self.names})
        runs[name][repeat] = measured.to_vllm_json()
        self.save()

    def add_routing(self, load: ServiceLoad, routing: Mapping[str, Any]) -> None:
        """Stores what each variant's router did at a load."""
        self._routing[load] = dict(routing)

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
        write_json(self.path, self.to_json())

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
        runs = self._runs[load]
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
        found = {}
        for figure in COMPARED:
            pairs = [(first[n].get(figure), other[n].get(figure)) for n in both]
            if all(a and b for a, b in pairs):
                ratio = Ratio.of(
                    [float(a) for a, _ in pairs if a],
                    [float(b) for _, b in pairs if b],
                    self._settings.confidence,
                )
                found[figure] = ratio.to_json()
        return found


def medians(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Each figure's median over the repeats."""
    if not runs:
        return {}
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def plan_sha256(plan: Plan) -> str:
    """The first digits of a plan's digest, by which results tell plans apart."""
    return hashlib.sha256(json.dumps(plan.to_json(), sort_keys=True).encode()).hexdigest()[:16]
