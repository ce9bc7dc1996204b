"""The page of a bench, complete or not."""

from __future__ import annotations

from leanmoe.core.intervals import RatioOfRuns
from leanmoe.plan import Plan
from leanmoe.report.page import render, sure
from leanmoe.report.plots import describe_rule
from leanmoe.results.bench import THROUGHPUT, BenchedLoad, BenchResults

FIGURES = {
    "output_throughput": "output tok/s",
    "total_token_throughput": "total tok/s",
    "request_throughput": "req/s",
    "request_goodput": "goodput req/s",
    "median_ttft_ms": "TTFT ms",
    "p99_ttft_ms": "P99 TTFT",
    "median_tpot_ms": "TPOT ms",
    "p99_tpot_ms": "P99 TPOT",
    "p99_itl_ms": "P99 ITL",
    "median_e2el_ms": "E2EL ms",
}


def bench_page(results: BenchResults) -> str:
    """The whole page as HTML."""
    medians = [figures for load in results.loads for figures in load.median.values()]
    return render(
        "bench.html.j2",
        title=f"leanmoe bench: {results.model['name']}",
        results=results,
        headline=headline(results),
        figures={k: v for k, v in FIGURES.items() if any(k in median for median in medians)},
        unseen=_unseen(results),
        plans={v.name: _bands(v.plan) for v in results.variants},
        facts=_facts(results),
    )


def headline(results: BenchResults) -> str:
    """What the bench shows in one sentence, a loss as plainly as a win."""
    gains = [
        (gain[results.gained], name, load)
        for load in results.loads
        for name, gain in load.gain.items()
        if results.gained in gain
    ]
    if not gains:
        return "No variant was compared with another over repeats: no gain is claimed."
    gains.sort(key=lambda each: each[0].median)
    least, most = (_gain_in_words(results.confidence, *each) for each in (gains[0], gains[-1]))
    if results.gained != THROUGHPUT:
        return f"At best, TPOT {least}."
    text = f"Output throughput, best: {most}."
    return text if len(gains) == 1 else f"{text} Worst: {least}."


def _gain_in_words(confidence: float, gain: RatioOfRuns, name: str, load: BenchedLoad) -> str:
    median, low, high = (f"{100 * (each - 1):+.1f}%" for each in (gain.median, gain.low, gain.high))
    surely = "" if gain.low > 1 or gain.high < 1 else "; no difference shown"
    return f"{name} {median} at {load} ({sure(confidence)} interval {low} to {high}{surely})"


def _unseen(results: BenchResults) -> str:
    """The variants whose routing could not be seen, and why."""
    reasons = {
        f" {name}: {seen.missing}."
        for load in results.loads
        for name, seen in load.routing.items()
        if seen.missing
    }
    return "".join(sorted(reasons))


def _bands(plan: Plan | None) -> str:
    if plan is None:
        return ""
    parts = {
        f"up to {band.up_to} tokens" if band.up_to else "beyond": band.rules for band in plan.bands
    }
    if plan.prompt:
        parts["prompts"] = plan.prompt
    return "; ".join(
        f"{name}: {' | '.join(dict.fromkeys(map(describe_rule, rules)))}"
        for name, rules in parts.items()
    )


def _facts(results: BenchResults) -> dict[str, str]:
    settings = results.settings
    prompts = f"{settings['input_len']} tokens of {results.text}"
    replies = f"{settings['output_len']} tokens, greedy, never stopped early"
    if results.dataset:
        prompts = replies = f"of dataset {results.dataset}"
    limits = ", ".join(f"{name} {most:g} ms" for name, most in settings["goodput"].items())
    return {
        "engine": results.engine,
        "prompts": prompts,
        "replies": replies,
        "goodput limits": limits,
    }
