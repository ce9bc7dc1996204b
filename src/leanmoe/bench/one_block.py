"""The console block that users of `vllm bench serve` know, with a column for each variant."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

WIDTH_OF_NAMES = 41
WIDTH_OF_COLUMN = 13
COUNTS = (
    ("Successful requests:", "completed", 0),
    ("Failed requests:", "failed", 0),
    ("Benchmark duration (s):", "duration", 2),
    ("Total input tokens:", "total_input_tokens", 0),
    ("Total generated tokens:", "total_output_tokens", 0),
    ("Request throughput (req/s):", "request_throughput", 2),
    ("Request goodput (req/s):", "request_goodput", 2),
    ("Output token throughput (tok/s):", "output_throughput", 2),
    ("Total token throughput (tok/s):", "total_token_throughput", 2),
)
SECTIONS = (
    ("Time to First Token", "ttft"),
    ("Time per Output Token (excl. 1st token)", "tpot"),
    ("Inter-token Latency", "itl"),
    ("End-to-end Latency", "e2el"),
)
STATISTICS = (("Mean", "mean"), ("Median", "median"), ("P90", "p90"), ("P99", "p99"))


def block(entry: Mapping[str, Any], confidence: float) -> str:
    """One load's results: each figure is the median over the repeats.

    `confidence` is what the intervals of the gains were asked for with.
    """
    names = [name for name, found in entry["median"].items() if found]
    medians = [entry["median"][name] for name in names]
    repeats = max(len(entry["runs"][name]) for name in names)
    width = WIDTH_OF_NAMES + sum(_column(name) for name in names)
    lines = [
        " Serving Benchmark Result ".center(width, "="),
        _row("", names, names),
        *_load(entry, names),
        *(
            _row(title, names, [_number(m.get(key), digits) for m in medians])
            for title, key, digits in COUNTS
            if any(key in m for m in medians)
        ),
        *_routing(entry, names),
    ]
    for title, key in SECTIONS:
        lines.append(f" {title} ".center(width, "-"))
        for word, statistic in STATISTICS:
            values = [_number(m.get(f"{statistic}_{key}_ms"), 2) for m in medians]
            lines.append(_row(f"{word} {key.upper()} (ms):", names, values))
    lines.append("=" * width)
    lines.append(f"Medians over {repeats} repeat{'s' if repeats > 1 else ''} of each.")
    lines += [
        f"{name}: distinct experts are not to be seen: {found['missing']}."
        for name, found in (entry.get("routing") or {}).items()
        if "missing" in found
    ]
    lines += [line for name in names if (line := _short_line(entry, name))]
    lines += [gain_line(entry, name, names[0], confidence) for name in names[1:]]
    return "\n".join(lines)


def gain_line(entry: Mapping[str, Any], name: str, first: str, confidence: float) -> str:
    """What a variant gains over the first one, with its interval; or why nothing can be said."""
    gain = entry["gain"].get(name)
    if not gain and any(_short(entry, each) for each in (name, first)):
        return f"{name} over {first}: replies have other lengths, so no gain is claimed."
    if not gain:
        return f"{name} over {first}: no interval from a single repeat, so no gain is claimed."
    parts = []
    for figure, word in (
        ("output_throughput", "output tokens/s"),
        ("median_tpot_ms", "median TPOT"),
    ):
        if found := gain.get(figure):
            parts.append(f"{word} {interval(found, confidence)}")
    said = "; ".join(parts)
    if found := gain.get("output_throughput"):
        said += f". {verdict(found, is_open=entry['request_rate'] is not None)}"
    return f"{name} over {first}: {said}"


def _short(entry: Mapping[str, Any], name: str) -> int:
    """Replies of all repeats that ended before what was asked for."""
    return sum(int(run.get("short_replies", 0)) for run in entry["runs"][name])


def _short_line(entry: Mapping[str, Any], name: str) -> str | None:
    short = _short(entry, name)
    if not short:
        return None
    whole = sum(int(run["completed"]) for run in entry["runs"][name])
    return f"{name}: {short} of {whole} replies were shorter than asked for; what came is counted."


def interval(ratio: Mapping[str, float], confidence: float) -> str:
    """A ratio as a change in percent with its interval and how sure that is."""
    median, low, high = (100 * (ratio[key] - 1) for key in ("median", "low", "high"))
    return f"{median:+.1f}% ({100 * confidence:g}%: {low:+.1f} to {high:+.1f}%)"


def verdict(ratio: Mapping[str, float], is_open: bool = False) -> str:
    """What the interval of the throughput allows to say."""
    if is_open:
        return "At a given rate throughput is the rate: look at the latencies."
    if ratio["low"] > 1:
        return "A gain."
    if ratio["high"] < 1:
        return "A loss."
    return "No difference shown."


def _load(entry: Mapping[str, Any], names: list[str]) -> list[str]:
    if entry["request_rate"] is not None:
        rate = _number(entry["request_rate"], 2)
        return [_row("Request rate configured (RPS):", names, [rate] * len(names))]
    most = _number(entry["max_concurrency"], 0)
    return [_row("Maximum request concurrency:", names, [most] * len(names))]


def _routing(entry: Mapping[str, Any], names: list[str]) -> list[str]:
    routing = entry.get("routing") or {}
    if not any("distinct_experts_a_step" in found for found in routing.values()):
        return []
    return [
        _row(title, names, [_number(routing.get(name, {}).get(key), 2) for name in names])
        for title, key in (
            ("Experts a token, mean over layers:", "experts_a_token"),
            ("Distinct experts a step:", "distinct_experts_a_step"),
        )
    ]


def _row(title: str, names: list[str], values: list[str]) -> str:
    cells = "".join(value.rjust(_column(name)) for name, value in zip(names, values, strict=True))
    return f"{title:<{WIDTH_OF_NAMES}}{cells}"


def _column(name: str) -> int:
    return max(WIDTH_OF_COLUMN, len(name) + 2)


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
