"""The page of a tune run."""

from __future__ import annotations

from leanmoe.core.provenance import StepsMadeWith
from leanmoe.plan import Plan
from leanmoe.report.page import render, sure
from leanmoe.results.tune import TextPart, TuneResults, percent


def tune_page(results: TuneResults, plan: Plan) -> str:
    """The whole page as HTML."""
    return render(
        "tune.html.j2",
        title=f"leanmoe tune: {results.model.name}",
        results=results,
        headline=headline(results),
        levels=[_shown_level(results, plan, level.name) for level in plan.levels],
        facts=_facts(results),
    )


def headline(results: TuneResults) -> str:
    """The verdict in one sentence a level, losses and ties as plainly as wins."""
    several = len(results.margins) > 1
    told = []
    for name, margin in results.margins.items():
        words = _headline(results.of_level(name), str(margin))
        told.append(f"Level {name}: {words}" if several else words)
    return " ".join(told)


def _headline(results: TuneResults, margin: str) -> str:
    accepted = [
        (verdict.gain, verdict.loss, verdict.concurrency)
        for verdict in results.verdicts
        if verdict.accepted and verdict.gain and verdict.loss
    ]
    proven = [verdict for verdict in results.verdicts if verdict.accepted and verdict.loss]
    if not accepted and proven:
        loads = ", ".join(str(verdict.concurrency) for verdict in proven)
        return (
            f"The plan's loss is proven within {margin} at concurrency {loads}. Its gain was not "
            "measured: measure it in the engine that serves it."
        )
    if not accepted and is_restricted(results):
        return (
            f"No plan is surely faster: the plan is {results.keep} of the experts alone, whose "
            f"loss is proven within {margin}."
        )
    if not accepted:
        return (
            f"No plan is faster with a loss proven within {margin}: there is no such level, and "
            "the model runs as it was trained."
        )
    gain, loss, concurrency = max(accepted, key=lambda each: each[0].median)
    confidence = sure(results.confidence)
    return (
        f"{percent(gain.median - 1, 1)} output throughput at concurrency {concurrency} "
        f"({confidence} interval {percent(gain.low - 1, 1)} to {percent(gain.high - 1, 1)}), "
        f"next-token loss at most {percent(loss.upper_bound)} higher with {confidence} confidence "
        f"(margin {margin})."
    )


def is_restricted(results: TuneResults) -> bool:
    """Whether a memory budget is met: every rule uses the experts kept alone."""
    chosen = any(point.chosen for front in results.fronts for point in front.points)
    return results.keep is not None and chosen


def _shown_level(
    results: TuneResults, plan: Plan, name: str
) -> tuple[str, Plan, dict[int, tuple[float, ...]]]:
    """A level's name, it alone, and mean slots a token by layer for bands of a chosen plan."""
    fronts = results.of_level(name if name in results.margins else "").fronts
    chosen = [point for front in fronts for point in front.points if point.chosen]
    level = plan.at(name)
    slots = {
        number: point.slots_per_layer
        for number, band in enumerate(level.bands)
        for point in chosen
        if point.rules == band.rules
    }
    return name, level, slots


def _facts(results: TuneResults) -> dict[str, str]:
    text = results.text
    return {
        "experts run by": results.model.experts_implementation,
        "text": text.source,
        "calibration": _part(text.calibration),
        "held out": _part(text.heldout),
        "steps made with": "; ".join(_made_with(each) for each in results.made_with),
        "seconds": ", ".join(f"{step} {taken:.0f}" for step, taken in results.seconds.items()),
        "peak memory": f"{results.peak_memory_bytes / 1e9:.2f} GB",
    }


def _part(part: TextPart) -> str:
    return f"{part.documents:,} documents, {part.tokens:,} tokens"


def _made_with(made: StepsMadeWith) -> str:
    return (
        f"{len(made.steps)} with leanmoe {made.leanmoe} ({made.commit}), torch {made.torch}, on "
        f"{made.machine}"
    )
