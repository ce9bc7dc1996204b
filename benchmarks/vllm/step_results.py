"""What a benchmark of vLLM measured: medians with intervals, as JSON and on screen."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from benchmarks.vllm.variants import STOCK, Variant

Point = tuple[str, int, str]
"""Routing, requests and the name of a variant."""
TIMES = ("step_ms", "tpot_ms", "tokens_per_second")


class Seen(NamedTuple):
    """The experts of one step, means over its layers."""

    distinct: float
    most_loaded: float
    """Distinct experts of the GPU that has most of them, in each layer the one that has."""
    by_rank: tuple[float, ...]
    activated: float
    """Experts a token."""


class Results:
    """Samples by point, name and round."""

    def __init__(self) -> None:
        self._samples: dict[Point, dict[str, dict[int, list[float]]]] = {}
        self._seen: dict[Point, list[Seen]] = {}

    def add(self, number: int, point: Point, name: str, value: float) -> None:
        """One sample of a round."""
        self._samples.setdefault(point, {}).setdefault(name, {}).setdefault(number, []).append(
            value
        )

    def see(self, point: Point, seen: Seen) -> None:
        """The experts of the step that was measured."""
        self._seen.setdefault(point, []).append(seen)

    @property
    def points(self) -> int:
        """How many have been measured."""
        return len(self._samples)

    def mean_step(self, load: int, variant: str, routings: Sequence[str]) -> float:
        """Milliseconds a step so far, over all routings."""
        found = []
        for routing in routings:
            values = self._samples[routing, load, variant]
            rounds = values.get("step_ms") or values["tpot_ms"]
            found.append(median(sample for samples in rounds.values() for sample in samples))
        return sum(found) / len(found)

    def lines(self, variants: Sequence[Variant]) -> list[dict[str, Any]]:
        """One entry for each routing, load and variant, in the order of `variants`."""
        experts, found = {variant.name: variant.experts for variant in variants}, []
        places = {name: place for place, name in enumerate(experts)}
        heads = {point[:2]: place for place, point in enumerate(self._samples)}
        points = sorted(self._samples, key=lambda point: (heads[point[:2]], places[point[2]]))
        for routing, load, variant in points:
            values = self._samples[routing, load, variant]
            stock = self._samples.get((routing, load, STOCK), {})
            entry: dict[str, Any] = {"routing": routing, "requests": load, "plan": variant}
            entry["experts"] = experts[variant]
            for name, rounds in values.items():
                entry[name] = interval(
                    [sample for samples in rounds.values() for sample in samples]
                )
                is_rate = name == "tokens_per_second"
                others = stock.get(name, {})  # a run that was stopped may not have come to it
                pairs = [
                    p for n, s in rounds.items() for p in zip(others.get(n, ()), s, strict=False)
                ]
                if pairs:
                    gains = [b / a if is_rate else a / b for a, b in pairs]
                    entry[f"gain_{name}"] = interval(gains)
            if seen := self._seen.get((routing, load, variant)):
                for name in ("distinct", "most_loaded", "activated"):
                    entry[name] = round(sum(getattr(one, name) for one in seen) / len(seen), 3)
                ranks = zip(*(one.by_rank for one in seen), strict=True)
                entry["distinct_by_rank"] = [round(sum(r) / len(r), 2) for r in ranks]
            found.append(entry)
        return found


def show(entries: Sequence[dict[str, Any]], is_parallel: bool = False) -> None:
    """Captured steps if there are any, then whole engine steps: a table for each routing.

    Of several GPUs also the experts of the most loaded one.
    """
    lines = {(e["routing"], e["requests"], e["plan"]): e for e in entries}
    routings, loads, variants = (list(dict.fromkeys(key[i] for key in lines)) for i in range(3))
    width = max(20, *(len(variant) for variant in variants)) if variants else 20
    most = ", of the most loaded GPU" if is_parallel else ""
    for name in TIMES:
        if not any(name in entry for entry in entries):
            continue
        for routing in routings:
            print(f"\n{routing} routing: {name}, gain over stock, distinct experts a layer{most}")
            print(f"{'requests':>8} " + " ".join(f"{variant:>{width}}" for variant in variants))
            for load in loads:
                found = [lines.get((routing, load, variant)) for variant in variants]
                cells = [_cell(entry, name, is_parallel) for entry in found]
                print(f"{load:>8} " + " ".join(f"{cell:>{width}}" for cell in cells))


def show_gains(layouts: dict[str, Sequence[dict[str, Any]]]) -> None:
    """Each plan's gain at each load, one layout beside the other, and the fullest GPU's experts."""
    has_steps = any("step_ms" in entry for found in layouts.values() for entry in found)
    name = "step_ms" if has_steps else "tpot_ms"
    by_key = {
        (e["routing"], e["plan"], e["requests"], layout): e
        for layout, found in layouts.items()
        for e in found
    }
    for routing, plan in dict.fromkeys(key[:2] for key in by_key):
        loads = sorted({key[2] for key in by_key if key[:2] == (routing, plan)})
        print(f"\n{routing} routing, {plan}: gain in {name}, experts of the most loaded GPU")
        print(f"{'requests':>8} " + " ".join(f"{layout:>14}" for layout in layouts))
        for load in loads:
            found = [by_key.get((routing, plan, load, layout)) for layout in layouts]
            cells = [
                "-"
                if entry is None or f"gain_{name}" not in entry
                else f"{entry[f'gain_{name}']['median']:.2f}x {entry.get('most_loaded', 0):.0f}"
                for entry in found
            ]
            print(f"{load:>8} " + " ".join(f"{cell:>14}" for cell in cells))


def interval(samples: Sequence[float]) -> dict[str, Any]:
    """Median and the 95% interval of the median over 2,000 resamples."""
    generator, count = np.random.default_rng(0), len(samples)
    drawn = np.sort(np.median(generator.choice(samples, (2000, count)), axis=1))
    low, high = float(drawn[int(0.025 * 2000)]), float(drawn[int(0.975 * 2000) - 1])
    return {"median": _short(median(samples)), "low": _short(low), "high": _short(high), "n": count}


def _short(value: float) -> float:
    return float(f"{value:.5g}")


def _cell(entry: dict[str, Any] | None, name: str, is_parallel: bool) -> str:
    if entry is None or f"gain_{name}" not in entry:
        return "-"
    gain = entry[f"gain_{name}"]["median"]
    found = f"{entry[name]['median']:.4g} {gain:.2f}x {entry.get('distinct', 0):.0f}"
    return f"{found} {entry.get('most_loaded', 0):.0f}" if is_parallel else found
