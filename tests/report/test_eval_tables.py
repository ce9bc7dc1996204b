"""The tables of an evaluation in terminals of any width: no cell is cut short."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from leanmoe.report.eval_tables import console_tables, sheets
from leanmoe.results.eval import EvalResults

INTERVAL = {"mean": 0.1277, "low": -0.1419, "high": 0.3973}
CHANGE = {"full": 1.0, "plan": 1.0, "mean": -0.0705, "low": -0.2442, "high": 0.1032}
LOSS = {"ratio": 0.0344, "low": 0.0317, "high": 0.0372, "upper_bound": 0.037, "documents": 53}
PLANS = ("top_k=6,renormalise=0", "top_k=6")
PROVENANCE = {
    "hardware": "a CPU",
    "cores": 2,
    "versions": {"torch": "2.13.0"},
    "commit": "0123456789ab",
    "date": "2026-01-01",
    "seed": 0,
    "command": "leanmoe eval",
}


def content() -> dict[str, Any]:
    """The results.json of two plans on replies and on two domains; no figure is a measurement."""
    return {
        "leanmoe_eval": 1,
        "provenance": PROVENANCE,
        "label": "measured",
        "settings": {
            "model": "reference",
            "confidence": 0.95,
            "margin": 0.01,
            "concurrency": 1,
        },
        "experts_implementation": "leanmoe cpu",
        "plans": [],
        "seconds": {},
        "generation": {
            "tokens": 16,
            "prompts": 12,
            "together": 1,
            "samples": 0,
            "temperature": 1.0,
            "rows": [_reply(plan) for plan in PLANS],
        },
        "domains": {
            "calibrate": None,
            "domains": [
                {"name": name, "unit": "passages", "units": 53, "tokens": 900, "full_loss": 2.0}
                for name in "ab"
            ],
            "rows": [{"plan": plan, "loss": {"a": LOSS, "b": LOSS}} for plan in PLANS],
        },
    }


def _reply(plan: str) -> dict[str, Any]:
    parts = [
        {"from": n, "to": n + 1, **INTERVAL, "mean": mean} for n, mean in ((0, 0.1008), (8, 0.2285))
    ]
    return {
        "plan": plan,
        "mixes": 1,
        "agreement": {"same": 0.083, "quantiles": {"0.5": 2}, "mean": 3.0, "tokens": 16},
        "repetition": CHANGE,
        "length": CHANGE,
        "divergence": {"growth": INTERVAL, "parts": parts},
    }


def results() -> EvalResults:
    """The results as reading them gives them."""
    return EvalResults.from_json(content())


@pytest.mark.parametrize("width", [80, 100, 120, 200])
def test_no_cell_is_cut_short(width: int) -> None:
    console = Console(file=io.StringIO(), width=width)
    for table in console_tables(results(), console):
        console.print(table)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in shown
    assert max(map(len, shown.splitlines())) <= width
    for sheet in sheets(results()):
        words = {
            word for row in (sheet.heads, *sheet.rows) for cell in row for word in cell.split()
        }
        assert words <= set(shown.replace("│", " ").replace("┃", " ").split())


def test_wide_tables_stand_and_narrow_ones_lie_on_their_side() -> None:
    replies = [console_tables(results(), Console(width=width))[0] for width in (80, 200)]
    assert [len(table.columns) for table in replies] == [2, 9]


def test_lengths_are_a_ratio_or_said_not_to_be_measurable() -> None:
    value = content()
    ended = {"prompts": 32, "most": 16, "full_ended": 30, "plan_ended": 29, "both_ended": 28}
    first, second = value["generation"]["rows"]
    first["finished"] = {**ended, "ratio": {"ratio": 1.1, "low": 1.05, "high": 1.15}}
    second["finished"] = {**ended, "both_ended": 3, "ratio": None}
    (sheet,) = (s for s in sheets(EvalResults.from_json(value)) if "Greedy" in s.title)
    cells = [row[sheet.heads.index("length, ratio where both end")] for row in sheet.rows]
    assert cells == ["1.100 [1.050, 1.150], 28 of 32 end", "not measurable: 3 of 32 end"]
