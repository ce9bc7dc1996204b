"""The page of a bench: plots, a table of every load, and how it was made, in one HTML file."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

from leanmoe.core.errors import LeanMoeError
from leanmoe.core.files import read_json, write_text
from leanmoe.report import bench_plots
from leanmoe.report.bench_plots import Bench, load_value, names
from leanmoe.report.page import document, number_cell, plot, ratio_cell, section, sure, table_with
from leanmoe.results.tune import describe_rule

SCHEMA_VERSION = 1
SECTIONS = ("provenance", "variants", "settings", "loads", "devices", "complete")
FIGURES = (
    ("output tok/s", "output_throughput"),
    ("total tok/s", "total_token_throughput"),
    ("req/s", "request_throughput"),
    ("goodput req/s", "request_goodput"),
    ("TTFT ms", "median_ttft_ms"),
    ("P99 TTFT", "p99_ttft_ms"),
    ("TPOT ms", "median_tpot_ms"),
    ("P99 TPOT", "p99_tpot_ms"),
    ("P99 ITL", "p99_itl_ms"),
    ("E2EL ms", "median_e2el_ms"),
)


def write_bench_page(results: Path, target: Path) -> Path:
    """Writes the page of a bench's results.json; returns where."""
    write_text(target, bench_page(read_bench(results)))
    return target


def read_bench(path: Path) -> Bench:
    """The results of a bench, with schema version and sections checked."""
    bench = read_json(path, "bench results")
    version = bench.get("leanmoe_bench") if isinstance(bench, dict) else None
    if version != SCHEMA_VERSION:
        raise LeanMoeError(
            f"bench results {path} have schema version {version!r}: this leanmoe reads "
            f"{SCHEMA_VERSION}"
        )
    missing = [each for each in SECTIONS if each not in bench]
    if missing:
        raise LeanMoeError(f"bench results {path} are incomplete: {missing[0]} is missing")
    return dict(bench)


def bench_page(bench: Bench) -> str:
    """The whole page as HTML."""
    body = [_head(bench)]
    if bench["loads"]:
        body += [_gain(bench), _throughput(bench), _users(bench), _table(bench)]
    body += [_variants(bench), _provenance(bench)]
    return document(f"leanmoe bench: {_model(bench)}", "".join(body))


def headline(bench: Bench) -> str:
    """What the bench shows in one sentence, a loss as plainly as a win."""
    figure = bench_plots.gained(bench) if bench["loads"] else ""
    found = [
        (gain[figure], name, entry)
        for entry in bench["loads"]
        for name, gain in entry["gain"].items()
        if figure in gain
    ]
    if not found:
        return "No variant was compared with another over repeats: no gain is claimed."
    if figure != "output_throughput":
        best = min(found, key=lambda each: float(each[0]["median"]))
        return f"At best, TPOT {_said(bench, *best)}."
    best = max(found, key=lambda each: float(each[0]["median"]))
    worst = min(found, key=lambda each: float(each[0]["median"]))
    text = f"Output throughput, best: {_said(bench, *best)}."
    return text if len(found) == 1 else f"{text} Worst: {_said(bench, *worst)}."


def _said(bench: Bench, found: dict[str, Any], name: str, entry: dict[str, Any]) -> str:
    low, high = (f"{100 * (found[key] - 1):+.1f}%" for key in ("low", "high"))
    surely = "" if found["low"] > 1 or found["high"] < 1 else "; no difference shown"
    return (
        f"{name} {100 * (found['median'] - 1):+.1f}% at {_load(entry)} "
        f"({sure(bench)} interval {low} to {high}{surely})"
    )


def _head(bench: Bench) -> str:
    warning = ""
    if not bench["complete"]:
        reason = escape(str(bench["stopped"]))
        warning = f'<p class="refused">Incomplete: {reason}. Below is what was measured.</p>'
    warning += "".join(f"<p>{escape(note)}</p>" for note in bench.get("notes", []))
    return (
        f"<h1>leanmoe bench: {escape(_model(bench))}</h1>"
        f'<p class="lead">{escape(headline(bench))}</p>{warning}'
    )


def _gain(bench: Bench) -> str:
    first = names(bench)[0]
    return section(
        "Gain against load",
        "measured",
        f"Each variant over {first}, paired by repeat; bars are {sure(bench)} intervals. Below the "
        "line is "
        "a loss"
        + (", except for times." if bench_plots.gained(bench) != "output_throughput" else "."),
        plot(bench_plots.gain(bench)),
    )


def _throughput(bench: Bench) -> str:
    return section(
        "Throughput against load",
        "measured",
        "Lines join the medians over repeats; small points are the repeats themselves.",
        plot(bench_plots.throughput(bench)),
    )


def _users(bench: Bench) -> str:
    device = bench["devices"]
    return section(
        f"What one user gets against what one {device['kind']} gives",
        "measured",
        "Each point is a load (its number beside the first variant's). Up and to the right is "
        f"better. The throughput is shared by {device['count']} {device['kind']}"
        + ("s." if device["count"] > 1 else "."),
        plot(bench_plots.user_against_device(bench)),
    )


def _table(bench: Bench) -> str:
    shown = [
        (title, figure)
        for title, figure in FIGURES
        if any(figure in m for e in bench["loads"] for m in e["median"].values())
    ]
    rows: list[list[str]] = []
    ours: set[int] = set()
    for entry in bench["loads"]:
        for place, name in enumerate(names(bench)):
            median = entry["median"].get(name) or {}
            gain = entry["gain"].get(name, {}).get(bench_plots.gained(bench))
            if place:
                ours.add(len(rows))
            distinct = entry["routing"].get(name, {}).get("distinct_experts_a_step")
            rows.append(
                [
                    _load(entry),
                    escape(name),
                    ratio_cell(gain) if gain else "",
                    *(number_cell(median.get(figure)) for _, figure in shown),
                    number_cell(distinct),
                    str(len(entry["runs"].get(name, []))),
                ]
            )
    titles = ["load", "variant", "gain", *(t for t, _ in shown), "distinct experts", "repeats"]
    return section(
        "Every load",
        "measured",
        "Medians over repeats, under the names of vllm bench serve. Distinct experts a step were "
        "counted in a short run after the timed ones, where they can be seen." + _unseen(bench),
        table_with(titles, rows, words={1}, ours=ours),
    )


def _unseen(bench: Bench) -> str:
    """Of which variants the routing could not be seen, and why."""
    reasons = {
        f" {name}: {found['missing']}."
        for entry in bench["loads"]
        for name, found in entry["routing"].items()
        if "missing" in found
    }
    return "".join(sorted(reasons))


def _variants(bench: Bench) -> str:
    rows = []
    for variant in bench["variants"]:
        where = variant.get("url") or variant.get("experts_implementation") or ""
        plan = variant.get("plan")
        rows.append([escape(variant["name"]), escape(str(where)), escape(_bands(plan))])
    return section(
        "What ran",
        "",
        "The first variant is what the others are compared with.",
        table_with(["variant", "run by", "plan"], rows, words={1, 2}),
    )


def _bands(plan: dict[str, Any] | None) -> str:
    if not plan:
        return ""
    parts = []
    for band in plan["bands"]:
        rules = list(dict.fromkeys(describe_rule(rule) for rule in band["rules"]))
        until = f"up to {band['up_to']} tokens" if band["up_to"] else "beyond"
        parts.append(f"{until}: {' | '.join(rules)}")
    if plan.get("prompt"):
        rules = list(dict.fromkeys(describe_rule(rule) for rule in plan["prompt"]))
        parts.append(f"prompts: {' | '.join(rules)}")
    return "; ".join(parts)


def _provenance(bench: Bench) -> str:
    made, settings = bench["provenance"], bench["settings"]
    facts = {
        "engine": bench.get("engine", ""),
        "hardware": f"{made['hardware']}, {made['cores']} cores",
        "versions": ", ".join(f"{name} {v}" for name, v in made["versions"].items()),
        "commit": made["commit"],
        "date": made["date"],
        "seed": str(made["seed"]),
        "command": made["command"],
        "prompts": f"{settings['input_len']} tokens of {bench.get('text', '')}",
        "replies": f"{settings['output_len']} tokens, greedy, never stopped early",
    }
    if dataset := settings.get("dataset_path") or settings.get("dataset"):
        facts["prompts"] = facts["replies"] = f"of dataset {dataset}"
    if settings.get("goodput"):
        limits = ", ".join(f"{name} {limit:g} ms" for name, limit in settings["goodput"].items())
        facts["goodput limits"] = limits
    items = "".join(f"<dt>{escape(k)}</dt><dd>{escape(str(v))}</dd>" for k, v in facts.items())
    return section("How this was made", "", "", f"<dl>{items}</dl>")


def _model(bench: Bench) -> str:
    return str(bench.get("model", {}).get("name", ""))


def _load(entry: dict[str, Any]) -> str:
    unit = "at once" if entry["request_rate"] is None else "a second"
    return f"{load_value(entry):g} {unit}"
