"""Held-out texts, and the files that an evaluation needs."""

from __future__ import annotations

from pathlib import Path

import pytest

from leanmoe.core.errors import LeanMoeError
from leanmoe.scoring.rows import ScoredRow
from reference_model import tasks


def test_wikitext_is_split_at_article_titles_only() -> None:
    text = " \n = One = \n \n text \n = = Part = = \n more \n = Two = \n text \n"
    assert len(tasks.split_articles(text)) == 2


def test_the_sample_is_the_first_window_of_each_unit() -> None:
    rows = [ScoredRow((0, i, i)) for i in range(1, 6)]
    text = tasks.Text(rows, [1, 2, 3, 4, 5], [0, 0, 1, 2, 2], "document", 3, 10)
    assert text.unit_bytes.tolist() == [3, 3, 9]
    whole = tasks.first_windows(text, tokens=1000, seed=0)
    assert sorted(whole.row_bytes) == [1, 3, 4]
    assert whole.unit_bytes.tolist() == whole.row_bytes
    some = tasks.first_windows(text, tokens=3, seed=0)
    assert some.rows == whole.rows[:2]


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(LeanMoeError, match=r"novels_valid\.txt.*blimp"):
        tasks.require_files(tmp_path)
