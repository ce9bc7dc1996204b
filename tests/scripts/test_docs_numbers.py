"""Numbers in the documentation are those of their results files; a wrong one is found."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.docs_numbers import PAGES, ROOT, blocks_of, problems_of, problems_on, read_mark

NO_FILE = 1
"""Blocks whose results file was not kept. This number only falls."""
HEAD = "<!-- numbers: processor-demo.json\n"


def problems(text: str) -> list[str]:
    page = ROOT / "docs" / "page.md"
    return [problem for block in blocks_of(page, text) for problem in problems_of(block)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_number_is_its_file_s(page: Path) -> None:
    assert not problems_on(page)


def test_few_numbers_have_no_file() -> None:
    marked = [block for page in PAGES for block in blocks_of(page) if block.mark]
    assert sum(read_mark(block).label == "no file" for block in marked) <= NO_FILE


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("It gains 4.2% here.", "no mark says where ['4.2%'] come from"),
        (f"{HEAD}- gains {{2 + 2:.1f}}%\n-->\nIt gains 4.2% here.", "the file says 'gains 4.0%'"),
        (f"{HEAD}- gains {{2 + 2}}\n-->\nIt gains 4, or 5%.", "no phrase of the mark holds ['5%']"),
        (f"{HEAD}b = {{1 + 1}}\n-->\n| a | b |\n|---|---|\n| x | 3 |", "'3' is '2' in the file"),
        (f"{HEAD}!b = yes\n-->\n| a | b |\n|---|---|\n| x | no |", "'no' is 'yes' in the file"),
        (f"{HEAD}c = 1\n-->\n| a | b |\n|---|---|\n| x | 3 |", "'3' has no template"),
        (f"{HEAD}- {{d.verdicts(concurrency=7)}}\n-->\nText.", "0 rows have"),
        (f"{HEAD}- {{d.model.missing}}\n-->\nText.", "KeyError: 'missing'"),
        ("<!-- numbers: nothing.json -->\nIt gains.", "0 results files end in nothing.json"),
        ("<!-- numbers: guessed -->\nIt gains 4%.", "neither a file nor one of"),
        (f"{HEAD}what\n-->\nIt gains.", "is not understood"),
    ],
)
def test_what_is_wrong_is_said(text: str, problem: str) -> None:
    found = problems(text)
    assert len(found) >= 1
    assert problem in found[0]


@pytest.mark.parametrize(
    "text",
    [
        "Python 3.11, vLLM 0.24.0 and arXiv 2505.03531 of 2026-11-27, 256 tokens, `0.5%`.",
        "```\n4.2%\n```",
        "<!-- numbers: cited, the paper -->\nIt gains 4.2%.",
        f"{HEAD}n := 2 + 2\n- **{{n}}%** of {{n}}\n-->\n\n- It gains [**4%**](#a) of\n  4.",
        f"{HEAD}x @ b = {{key * 2}}1\nc* = given\n-->\n| a | b | c d |\n|-|-|-|\n| x | xx1 | 5% |",
    ],
)
def test_what_is_right_passes(text: str) -> None:
    assert not problems(text)
