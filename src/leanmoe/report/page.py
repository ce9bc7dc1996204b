"""Puts plots, tables and provenance into one HTML file that opens without a network."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from leanmoe.core.files import read_json, write_text
from leanmoe.report import plots
from leanmoe.results.tune import Results, percent, read_results

STYLE = """
:root { --ink: #1d2b3a; --soft: #5c6b7a; --line: #dfe5ea; --ours: #0b7a75; --bad: #b3261e; }
* { box-sizing: border-box; }
body { font: 15px/1.55 system-ui, sans-serif; color: var(--ink); margin: 0; background: #f6f8f9; }
main { max-width: 1140px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 19px; margin: 0 0 2px; }
p.lead { font-size: 17px; margin: 8px 0 20px; } p { margin: 6px 0 12px; max-width: 76ch; }
section { background: #fff; border: 1px solid var(--line); border-radius: 8px;
  padding: 20px 22px; margin: 18px 0; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums;
  font-size: 14px; }
th, td { text-align: right; vertical-align: baseline; padding: 6px 8px;
  border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; } th:first-child, td:first-child { text-align: left; }
td:first-child:not(.words), td small { white-space: nowrap; } td.words { min-width: 6em; }
td.words, th.words { text-align: left; } tr.ours td { background: #eef7f6; font-weight: 600; }
.accepted { color: var(--ours); font-weight: 600; } .refused { color: var(--bad); }
.label { font-size: 12px; color: var(--soft); border: 1px solid var(--line); border-radius: 99px;
  padding: 1px 9px; margin-left: 8px; vertical-align: 2px; font-weight: 400; }
.scroll { overflow-x: auto; }
.plotly-graph-div { min-width: 560px; } small, .soft { color: var(--soft); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 18px; margin: 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
"""


BUTTONS = [["toImage", "resetScale2d"]]
"""Above a plot; more of them lie over its legend in a narrow window."""


def write_report(run: Path, target: Path | None = None) -> Path:
    """Writes `run`/report.html (or `target`) from its results.json and plan.json; returns it."""
    results = read_results(run / "results.json")
    plan = read_json(run / "plan.json", "plan")
    target = target or run / "report.html"
    write_text(target, page(results, plan))
    return target


def page(results: Results, plan: dict[str, Any]) -> str:
    """The whole page as HTML."""
    body = "".join(
        [
            _head(results),
            _verdicts(results),
            *_gain(results),
            *[_front(results, f["concurrency"]) for f in results["fronts"]],
            _plan(results, plan),
            *_strategies(results),
            *_totals(results),
            _experts(results),
            _provenance(results),
        ]
    )
    return document(f"leanmoe: {results['model']['name']}", body)


def document(title: str, body: str) -> str:
    """A page from its sections' HTML; the title is escaped, plotly's script inlined once."""
    from plotly.offline import get_plotlyjs

    title = escape(title)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style><script>{get_plotlyjs()}</script></head>"
        f"<body><main>{body}</main></body></html>\n"
    )


def sure(results: dict[str, Any]) -> str:
    """The confidence that a run was asked for, in percent."""
    return f"{100 * results['settings']['confidence']:g}%"


def is_restricted(results: Results) -> bool:
    """Whether a memory budget is met: every rule uses the experts kept alone."""
    has_budget = results["settings"].get("keep") is not None
    return has_budget and any(p["chosen"] for f in results["fronts"] for p in f["points"])


def headline(results: Results) -> str:
    """The verdict in one sentence, losses and ties as plainly as wins."""
    accepted = [v for v in results["verdicts"] if v["accepted"] and v.get("gain")]
    margin = percent(results["settings"]["margin"], 1)
    if not accepted and is_restricted(results):
        return (
            f"No plan is surely faster: the plan is {results['settings']['keep']} of the experts "
            f"alone, whose loss is proven within {margin}."
        )
    if not accepted:
        return (
            f"No plan is faster with a loss proven within {margin}: the plan stays empty and the "
            "model runs as it was trained."
        )
    best = max(accepted, key=lambda v: float(v["gain"]["median"]))
    gain = best["gain"]
    return (
        f"{percent(gain['median'] - 1, 1)} output throughput at {best['concurrency']} requests at "
        f"once ({sure(results)} interval {percent(gain['low'] - 1, 1)} to "
        f"{percent(gain['high'] - 1, 1)}), "
        f"next-token loss at most {percent(best['loss']['upper_bound'])} higher with "
        f"{sure(results)} confidence (margin {margin})."
    )


def _head(results: Results) -> str:
    model = results["model"]
    return (
        f"<h1>leanmoe tune: {escape(model['name'])}</h1>"
        f'<p class="lead">{escape(headline(results))}</p>'
    )


def _verdicts(results: Results) -> str:
    rows = []
    for verdict in results["verdicts"]:
        loss, gain = verdict.get("loss"), verdict.get("gain")
        word, kind = ("accepted", "accepted") if verdict["accepted"] else ("full model", "refused")
        rows.append(
            [
                f"{verdict['concurrency']} at once",
                f'<span class="{kind}">{word}</span>',
                _interval(loss, "ratio", 2) if loss else "",
                percent(loss["upper_bound"]) if loss else "",
                ratio_cell(gain) if gain else "",
                f'<span class="soft">{escape(verdict["reason"])}</span>',
            ]
        )
    names = ["load", "verdict", "loss", f"loss at most ({sure(results)})", "throughput", "why"]
    return section(
        "Verdict per load",
        "measured",
        "Loss is the relative increase in next-token loss on documents the search never saw, "
        "paired by document. Throughput is output tokens per second, plan over full model, "
        "interleaved in the same run on the same kernels.",
        table_with(names, rows, words={1, 5}),
    )


def _gain(results: Results) -> list[str]:
    if not results.get("gain"):
        return []
    rows = []
    for entry in results["gain"]:
        for name, measured in entry["variants"].items():
            cells = [plots.load_name(entry).replace("<br>", ", "), escape(name)]
            cells += [number_cell(value) for value in _metrics(measured)]
            rows.append(cells)
    names = ["load", "variant", "output tok/s", "TTFT ms", "TPOT ms", "E2EL ms"]
    return [
        section(
            "Gain over load",
            "measured",
            f"Medians over interleaved repeats; error bars are {sure(results)} intervals of "
            "the ratio.",
            plot(plots.gain(results)) + table_with(names, rows, words={1}),
        )
    ]


def _metrics(measured: dict[str, Any]) -> list[float | None]:
    def median(name: str) -> float | None:
        value = measured.get(name)
        return value.get("median") if isinstance(value, dict) else value

    return [median(n) for n in ("output_throughput", "ttft_ms", "tpot_ms", "e2el_ms")]


def _front(results: Results, concurrency: int) -> str:
    return section(
        f"Quality against speed at {concurrency} at once",
        "loss measured, layer time modelled",
        f"Each point is a whole plan, run on held-out text; bars are {sure(results)} intervals. "
        "A plan is chosen only if even its upper bound is under the margin.",
        plot(plots.front(results, concurrency)),
    )


def _plan(results: Results, plan: dict[str, Any]) -> str:
    slots = {}
    chosen = {
        f["concurrency"]: next((p for p in f["points"] if p["chosen"]), None)
        for f in results["fronts"]
    }
    for number, band in enumerate(plan["bands"]):
        point = next((p for p in chosen.values() if p and p.get("rules") == band["rules"]), None)
        if point and point.get("slots_per_layer"):
            slots[number] = point["slots_per_layer"]
    return section(
        "The plan",
        "",
        "What each MoE layer may activate: for prompt tokens, whose own prediction nobody reads, "
        "and for others by how many of them a forward step holds. “full” is the layer as it was "
        "trained.",
        plot(plots.plan_heat_map(plan, slots)) if plan["bands"] else "<p>The plan is empty.</p>",
    )


def _strategies(results: Results) -> list[str]:
    sections = []
    for concurrency in dict.fromkeys(t["concurrency"] for t in results.get("strategies", [])):
        tables = [t for t in results["strategies"] if t["concurrency"] == concurrency]
        body = plot(plots.strategies(results, concurrency))
        body += "".join(_strategy_table(table, sure(results)) for table in tables)
        sections.append(
            section(
                f"Every strategy on the same budget, {concurrency} at once",
                "measured",
                "Same held-out text, same mean cost. The last column is the loss over leanmoe's "
                "own at that budget, paired by document: above zero, leanmoe loses less.",
                body,
            )
        )
    return sections


def _strategy_table(table: dict[str, Any], sure: str) -> str:
    budget = table["budget"]
    rows, ours = [], set()
    for number, row in enumerate(sorted(table["rows"], key=lambda r: float(r["loss"]["ratio"]))):
        against = row.get("against")
        if row["strategy"] == "leanmoe":
            ours.add(number)
        rows.append(
            [
                escape(row["strategy"]),
                escape(row.get("source", "")),
                number_cell(row.get("slots")),
                number_cell(row.get("distinct")),
                _interval(row["loss"], "ratio", 2),
                _interval(against, "difference", 2) if against else "",
            ]
        )
    kind = "experts a token" if budget["kind"] == "slots" else "distinct experts a step"
    names = ["strategy", "source", "slots", "distinct", f"loss ({sure})", f"over leanmoe ({sure})"]
    return f"<h3>{budget['value']:.3g} {kind}</h3>" + table_with(names, rows, {1}, ours)


def _totals(results: Results) -> list[str]:
    """Fewer experts in total beside fewer a token, where there was a memory budget."""
    found = results.get("total_or_activated")
    if not found:
        return []
    rows = [
        [
            str(row["concurrency"]),
            escape(row["budget"]),
            escape(row["way"]),
            f"{row['memory']:.0%}",
            f"{row['time']:.0%}",
            _interval(row["loss"], "ratio", 2),
            escape(row.get("against", {}).get("verdict", "")),
        ]
        for row in found
    ]
    names = [
        "at once",
        "experts kept",
        "way",
        "memory",
        "time",
        f"loss ({sure(results)})",
        "verdict",
    ]
    return [
        section(
            "Fewer experts in total, or fewer a token?",
            "loss measured, layer time modelled",
            "At each load and memory budget: the experts kept alone, skipping that takes no longer "
            "with all of them in memory, and both. The verdict compares the first two, paired by "
            "document.",
            table_with(names, rows, {2, 6}),
        )
    ]


def _experts(results: Results) -> str:
    tokens = results["profile"]["tokens"]
    return section(
        "What the router does",
        "measured",
        f"On {tokens:,} tokens of calibration text. Top: how often each expert is chosen. "
        "Middle: distinct experts awake in a step. Bottom: gate mass of a token's best experts.",
        "".join(
            plot(figure)
            for figure in (
                plots.expert_use(results),
                plots.distinct_experts(results),
                plots.gate_mass(results),
            )
        ),
    )


def _provenance(results: Results) -> str:
    made = results["provenance"]
    text = results["text"]
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    facts = {
        "hardware": f"{made['hardware']}, {made['cores']} cores",
        "versions": versions,
        "commit": made["commit"],
        "date": made["date"],
        "seed": str(made["seed"]),
        "command": made["command"],
        "experts run by": results["model"].get("experts_implementation", ""),
        "text": text["source"],
        "calibration": _part(text["calibration"]),
        "held out": _part(text["heldout"]),
        "seconds": ", ".join(f"{k} {v:.0f}" for k, v in results.get("seconds", {}).items()),
    }
    if results.get("peak_memory_bytes"):
        facts["peak memory"] = f"{results['peak_memory_bytes'] / 1e9:.2f} GB"
    items = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts.items())
    notes = "".join(f"<li>{escape(note)}</li>" for note in results.get("notes", []))
    return section("How this was made", "", "", f"<dl>{items}</dl><ul>{notes}</ul>")


def _part(part: dict[str, Any]) -> str:
    return f"{part['documents']:,} documents, {part['tokens']:,} tokens"


def section(title: str, label: str, text: str, body: str) -> str:
    """A titled part of the page; `body` is HTML, the rest is escaped."""
    tag = f'<span class="label">{escape(label)}</span>' if label else ""
    prose = f'<p class="soft">{escape(text)}</p>' if text else ""
    return f"<section><h2>{escape(title)}{tag}</h2>{prose}{body}</section>"


def plot(figure: Any) -> str:
    """A figure as HTML, without plotly's script."""
    # The same results give the same page, byte for byte: plotly's own ids are drawn at random.
    name = hashlib.sha256(figure.to_json().encode()).hexdigest()[:12]
    html = figure.to_html(
        full_html=False,
        include_plotlyjs=False,
        config={"displaylogo": False, "responsive": True, "modeBarButtons": BUTTONS},
        div_id=f"plot-{name}",
    )
    return f'<div class="scroll">{html}</div>'


def table_with(
    names: Sequence[str],
    rows: Sequence[Sequence[str]],
    words: set[int] | None = None,
    ours: set[int] | None = None,
) -> str:
    """Cells are HTML already escaped; `words` are left-aligned columns, `ours` stressed rows."""

    def cell(tag: str, column: int, value: str) -> str:
        kind = ' class="words"' if words and column in words else ""
        return f"<{tag}{kind}>{value}</{tag}>"

    head = "".join(cell("th", c, escape(name)) for c, name in enumerate(names))
    body = "".join(
        f"<tr{' class=ours' if ours and n in ours else ''}>"
        + "".join(cell("td", c, value) for c, value in enumerate(row))
        + "</tr>"
        for n, row in enumerate(rows)
    )
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def _interval(value: dict[str, Any], name: str, digits: int) -> str:
    low, high = percent(value["low"], digits), percent(value["high"], digits)
    return f"{percent(value[name], digits)} <small>({low} to {high})</small>"


def ratio_cell(gain: dict[str, Any]) -> str:
    """A gain in percent with its interval."""
    low, high = percent(gain["low"] - 1, 1), percent(gain["high"] - 1, 1)
    return f"{percent(gain['median'] - 1, 1)} <small>({low} to {high})</small>"


def number_cell(value: float | None) -> str:
    """A figure to four digits or whole, never as a power of ten; nothing where there is none."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
