"""The tables of an evaluation in terminals of any width: no cell is cut short."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from leanmoe.report.quality_tables import console_tables, sheets

INTERVAL = {"mean": 0.1277, "low": -0.1419, "high": 0.3973}
CHANGE = {"mean": -0.0705, "low": -0.2442, "high": 0.1032}


def results() -> dict[str, object]:
    """Of two plans on replies and on two domains."""

    def reply(plan: str) -> dict[str, object]:
        return {
            "plan": plan,
            "agreement": {"same": 0.083, "quantiles": {"0.5": 2}},
            "repetition": CHANGE,
            "length": CHANGE,
            "divergence": {"growth": INTERVAL, "parts": [{"mean": 0.1008}, {"mean": 0.2285}]},
        }

    plans = ("top_k=6,keep_weights", "top_k=6")
    loss = {"ratio": 0.0344, "low": 0.0317, "high": 0.0372}
    return {
        "generation": {
            "tokens": 16,
            "prompts": 12,
            "together": 1,
            "rows": [reply(plan) for plan in plans],
        },
        "domains": {
            "domains": [{"name": name, "unit": "passages", "units": 53} for name in "ab"],
            "rows": [{"plan": plan, "loss": {"a": loss, "b": loss}} for plan in plans],
        },
    }


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
    assert [len(table.columns) for table in replies] == [2, 8]
