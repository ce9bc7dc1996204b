"""What `vllm_gpu.py` measured: medians with intervals, as JSON and on screen."""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from vllm_ways import STOCK, Way

Point = tuple[str, int, str]
"""Routing, requests and the name of a way."""


class Results:
    """Samples by point, name and round."""

    def __init__(self) -> None:
        self._samples: dict[Point, dict[str, dict[int, list[float]]]] = {}
        self._seen: dict[Point, list[tuple[float, float]]] = {}

    def add(self, number: int, point: Point, name: str, value: float) -> None:
        """One sample of a round."""
        self._samples.setdefault(point, {}).setdefault(name, {}).setdefault(number, []).append(
            value
        )

    def see(self, point: Point, distinct: float, activated: float) -> None:
        """Experts of a layer, and of a token, in the step that was measured."""
        self._seen.setdefault(point, []).append((distinct, activated))

    def mean_step(self, load: int, way: str, routings: Sequence[str]) -> float:
        """Milliseconds a step so far, over all routings."""
        found = []
        for routing in routings:
            values = self._samples[routing, load, way]
            rounds = values.get("step_ms", values["tpot_ms"])
            found.append(median(sample for samples in rounds.values() for sample in samples))
        return sum(found) / len(found)

    def lines(self, ways: Sequence[Way]) -> list[dict[str, Any]]:
        """One entry for each routing, load and way."""
        experts, found = {way.name: way.experts for way in ways}, []
        for (routing, load, way), values in self._samples.items():
            stock = self._samples[routing, load, STOCK]
            entry: dict[str, Any] = {"routing": routing, "requests": load, "plan": way}
            entry["experts"] = experts[way]
            for name, rounds in values.items():
                entry[name] = interval(
                    [sample for samples in rounds.values() for sample in samples]
                )
                is_rate = name == "tokens_per_second"
                pairs = [p for n, s in rounds.items() for p in zip(stock[name][n], s, strict=False)]
                entry[f"gain_{name}"] = interval([b / a if is_rate else a / b for a, b in pairs])
            if seen := self._seen.get((routing, load, way)):
                entry["distinct"] = round(sum(d for d, _ in seen) / len(seen), 2)
                entry["activated"] = round(sum(a for _, a in seen) / len(seen), 3)
            found.append(entry)
        return found


def write(folder: Path, name: str, content: dict[str, Any]) -> Path:
    """Writes results with their provenance, named by date, hardware and commit."""
    from leanmoe.provenance import collect
    from leanmoe.storage import write_json

    provenance = collect(" ".join(sys.argv), seed=0).to_json()
    hardware = provenance["hardware"].lower().replace(" ", "-")
    start = f"{provenance['date'][:10]}-{hardware}-{provenance['commit']}"
    path = folder / f"{start}-vllm-{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    head = {"leanmoe_benchmark": "vllm_gpu", "label": "measured", "provenance": provenance}
    write_json(path, head | content)
    return path


def show(entries: Sequence[dict[str, Any]], ways: Sequence[Way]) -> None:
    """The results on screen: captured steps if there are any, then whole engine steps."""
    lines = {(e["routing"], e["requests"], e["plan"]): e for e in entries}
    width = max(18, *(len(way.name) for way in ways))
    for name in ("step_ms", "tpot_ms", "tokens_per_second"):
        if not any(name in entry for entry in lines.values()):
            continue
        for routing in dict.fromkeys(entry["routing"] for entry in entries):
            print(f"\n{routing} routing: {name}, gain over stock, distinct experts a layer")
            print(f"{'requests':>8} " + " ".join(f"{way.name:>{width}}" for way in ways))
            for load in dict.fromkeys(entry["requests"] for entry in entries):
                cells = [_cell(lines.get((routing, load, way.name)), name) for way in ways]
                print(f"{load:>8} " + " ".join(f"{cell:>{width}}" for cell in cells))


def interval(samples: list[float]) -> dict[str, Any]:
    """Median and the 95% interval of the median over 2,000 resamples."""
    generator, count = random.Random(0), len(samples)
    drawn = sorted(median(generator.choices(samples, k=count)) for _ in range(2000))
    low, high = drawn[int(0.025 * 2000)], drawn[int(0.975 * 2000) - 1]
    return {"median": _short(median(samples)), "low": _short(low), "high": _short(high), "n": count}


def _short(value: float) -> float:
    return float(f"{value:.5g}")


def _cell(entry: dict[str, Any] | None, name: str) -> str:
    if entry is None or name not in entry:
        return "-"
    gain = entry[f"gain_{name}"]["median"]
    return f"{entry[name]['median']:.4g} {gain:.2f}x {entry.get('distinct', 0):.0f}"
