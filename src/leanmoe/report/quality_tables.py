"""The tables of an evaluation: on screen, and on its page."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from io import StringIO
from typing import Any

from rich.console import Console
from rich.table import Table

Results = dict[str, Any]


@dataclass(frozen=True)
class Sheet:
    """A table as text."""

    title: str
    note: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def console_tables(results: Results, console: Console) -> list[Table]:
    """Every table of the results for a terminal: on its side where a cell would be cut short."""
    found = []
    for sheet in sheets(results):
        table = Table(title=sheet.title, title_justify="left")
        for number, head in enumerate(sheet.heads):
            table.add_column(head, justify="left" if number == 0 else "right")
        for row in sheet.rows:
            table.add_row(*row)
        found.append(table if _is_whole(sheet, table, console) else _on_its_side(sheet))
    return found


def _is_whole(sheet: Sheet, table: Table, console: Console) -> bool:
    """Whether no word of it is cut short; rich alone knows how it divides a width."""
    shown = StringIO()
    Console(file=shown, width=console.width).print(table)
    words = {word for row in (sheet.heads, *sheet.rows) for cell in row for word in cell.split()}
    return words <= set(re.split(r"[\s│┃]+", shown.getvalue()))


def _on_its_side(sheet: Sheet) -> Table:
    """A line for each figure, the rows one below the other."""
    table = Table(title=sheet.title, title_justify="left", show_header=False)
    for row in sheet.rows:
        for head, cell in zip(sheet.heads, row, strict=True):
            table.add_row(head, cell)
        table.add_section()
    return table


def sheets(results: Results) -> list[Sheet]:
    """Every table of the results."""
    found: list[Sheet] = []
    if "tasks" in results:
        found += _tasks(results)
    if "generation" in results:
        found += _generation(results["generation"])
    if "domains" in results:
        found.append(_domains(results["domains"]))
    return found


def _tasks(results: Results) -> list[Sheet]:
    settings = results["settings"]
    sure = f"{100 * settings['confidence']:g}%"
    rows, details = [], []
    for row in results["tasks"]:
        rows.append(
            (
                row["plan"],
                row["task"],
                f"{row['items']:,}",
                f"{100 * row['full']:.2f}",
                f"{100 * row['accuracy']:.2f}",
                _points(row["difference"], row["low"], row["high"]),
                "yes" if row["verdict"]["accepted"] else "no",
            )
        )
        loss = row.get("loss")
        details.append(
            (
                row["plan"],
                row["task"],
                f"{row['lost']}/{row['gained']}",
                f"{row['mcnemar']:.2g}",
                f"{100 * row['smallest_seen']:.2f}",
                _batch_draws(row),
                "" if loss is None else _percent(loss["ratio"], loss["low"], loss["high"]),
            )
        )
    return [
        Sheet(
            f"Tasks: accuracy in percent, plan less full model in points [{sure}]",
            f"Paired by question; {_scope(_concurrency(settings))}.",
            (
                "plan",
                "task",
                "questions",
                "full",
                "plan's",
                "difference",
                f"within {100 * settings['margin']:g}",
            ),
            tuple(rows),
        ),
        Sheet(
            "Tasks: how sure",
            "Questions lost and gained; McNemar's exact p; the smallest loss, in points, that so "
            "many questions show with power 0.8; the worst and the best mix of company; and how "
            "much the loss of the right answers rises.",
            ("plan", "task", "lost/gained", "p", "smallest seen", "mixes", "loss of answers"),
            tuple(details),
        ),
    ]


def _concurrency(settings: Mapping[str, Any]) -> int:
    """Requests at once; results of before 2026-12 have them under another name."""
    return int(settings.get("concurrency") or settings["decode_batch"])


def _scope(requests: int) -> str:
    return "each decodes alone" if requests == 1 else f"{requests} decode together"


def _batch_draws(row: Results) -> str:
    if row["mixes"] == 1:
        return "1"
    return f"{row['mixes']}: {100 * row['lowest_mix']:+.2f} to {100 * row['highest_mix']:+.2f}"


def _generation(found: Results) -> list[Sheet]:
    rows = []
    for row in found["rows"]:
        agreement, growth = row["agreement"], row["divergence"]["growth"]
        rows.append(
            (
                row["plan"],
                f"{100 * agreement['same']:.1f}%",
                f"{agreement['quantiles']['0.5']:.0f}",
                _change(row["repetition"], 100),
                _change(row["length"], 1),
                f"{row['divergence']['parts'][0]['mean']:.4f}",
                f"{row['divergence']['parts'][-1]['mean']:.4f}",
                f"{growth['mean']:+.4f} [{growth['low']:+.4f}, {growth['high']:+.4f}]",
            )
        )
    sheets = [
        Sheet(
            f"Greedy replies of {found['tokens']} tokens to {found['prompts']} prompts",
            f"Of the requests {_scope(found['together'])}. Divergence: KL from the full model "
            "along its own replies, nats per token, each model with its own keys and values.",
            (
                "plan",
                "same to the end",
                "median first difference",
                "repetition, points",
                "length, tokens",
                "divergence, first eighth",
                "last eighth",
                "growth",
            ),
            tuple(rows),
        )
    ]
    answers = []
    for row in found["rows"]:
        if "exact_match" in row:
            match = row["exact_match"]
            answers.append(
                (
                    row["plan"],
                    "greedy",
                    f"{100 * match['full']:.2f}",
                    f"{100 * match['plan']:.2f}",
                    _points(match["difference"], match["low"], match["high"]),
                )
            )
        for entry in row.get("pass_at", []):
            answers.append(
                (
                    row["plan"],
                    f"pass@{entry['n']}",
                    f"{100 * entry['full']:.2f}",
                    f"{100 * entry['plan']:.2f}",
                    _points(entry["mean"], entry["low"], entry["high"]),
                )
            )
    if answers:
        sheets.append(
            Sheet(
                "Answers in replies: percent of prompts",
                f"Drawn at temperature {found['temperature']:g}; pass@n by the unbiased estimator "
                "of arXiv 2107.03374.",
                ("plan", "how", "full", "plan's", "difference"),
                tuple(answers),
            )
        )
    return sheets


def _domains(found: Results) -> Sheet:
    names = [domain["name"] for domain in found["domains"]]
    rows = tuple(
        (
            row["plan"],
            *(
                _percent(loss["ratio"], loss["low"], loss["high"])
                for loss in (row["loss"][name] for name in names)
            ),
        )
        for row in found["rows"]
    )
    units = ", ".join(f"{d['name']} {d['units']} {d['unit']}" for d in found["domains"])
    return Sheet(
        "Domains: increase of next-token loss on held-out text",
        f"Paired by document or passage ({units}).",
        ("plan", *(f"on {name}" for name in names)),
        rows,
    )


def _points(value: float, low: float, high: float) -> str:
    return f"{100 * value:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]"


def _percent(value: float, low: float, high: float) -> str:
    return f"{100 * value:+.2f}% [{100 * low:+.2f}, {100 * high:+.2f}]"


def _change(found: dict[str, float], times: float) -> str:
    values = [times * found[name] for name in ("mean", "low", "high")]
    return f"{values[0]:+.2f} [{values[1]:+.2f}, {values[2]:+.2f}]"
