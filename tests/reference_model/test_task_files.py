"""Task files on disk: rows of answers, and where a context that is too long is cut."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from leanmoe.core.errors import LeanMoeError
from reference_model.task_files import LAMBADA, lambada_rows


class Letters:
    start_id, context = 0, 12

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]


def test_a_context_is_cut_from_the_left_and_the_last_word_predicted(tmp_path: Path) -> None:
    (tmp_path / LAMBADA).write_text(json.dumps({"text": "a long passage whose last word"}) + "\n")
    (row,) = lambada_rows(Letters(), tmp_path)
    assert row.ids[row.first :] == tuple(map(ord, " word"))
    assert len(row.ids) == Letters.context + 1


class Words:
    """As SentencePiece: a word's token holds the space before it, and every text gets one."""

    start_id, context = 0, 12

    def encode(self, text: str) -> list[int]:
        return [len(word) for word in f"_{text}".replace(" ", " _").split(" ")]


def test_a_continuation_is_cut_into_tokens_with_its_context(tmp_path: Path) -> None:
    (tmp_path / LAMBADA).write_text(json.dumps({"text": "the last word"}) + "\n")
    (row,) = lambada_rows(Words(), tmp_path)
    assert row.ids == (0, 4, 5, 5)
    assert row.first == 3


def test_a_line_that_is_not_json_is_said_with_its_file(tmp_path: Path) -> None:
    (tmp_path / LAMBADA).write_text("a passage\n")
    with pytest.raises(LeanMoeError, match=r"lambada_openai_test\.jsonl is not JSON lines"):
        lambada_rows(Letters(), tmp_path)
