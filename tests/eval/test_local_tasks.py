"""Task files on disk: rows of answers, and which answer counts as chosen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from leanmoe.core.errors import LeanMoeError
from leanmoe.eval.local_tasks import Item, read_task
from leanmoe.scoring.rows import Score, ScoredRow


class Letters:
    start_id, context = 0, 12

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]


def test_of_several_answers_the_likeliest_per_byte_is_chosen() -> None:
    rows = (ScoredRow((0, 1)), ScoredRow((0, 1, 2)))
    scores = [Score(2.0, False), Score(3.0, False)]
    assert Item(rows, right=0).is_right(scores)
    assert Item(rows, right=1, answer_bytes=(1, 2)).is_right(scores)


def test_an_only_answer_is_right_if_each_token_is_the_likeliest() -> None:
    item = Item((ScoredRow((0, 1)),))
    assert item.is_right([Score(9.0, True)])
    assert not item.is_right([Score(0.1, False)])


def test_a_context_is_cut_from_the_left_and_the_last_word_predicted(tmp_path: Path) -> None:
    line = json.dumps({"text": "a long passage whose last word"})
    (tmp_path / "lambada_openai_test.jsonl").write_text(line + "\n")
    task = read_task("lambada", Letters(), tmp_path)
    (item,) = task.items
    (row,) = item.rows
    assert row.ids[row.first :] == tuple(map(ord, " word"))
    assert len(row.ids) == Letters.context + 1


def test_an_unknown_task_names_near_ones_and_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(LeanMoeError, match="did you mean piqa"):
        read_task("piqua", Letters(), tmp_path)
    with pytest.raises(LeanMoeError, match=r"qasc_dev\.jsonl, which does not exist"):
        read_task("qasc", Letters(), tmp_path)
