"""Prompts from a file, and the answers that replies should hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from leanmoe.eval.prompts import read_prompts
from tests.eval.test_run import write_lines


def test_an_answer_after_four_hashes_is_gsm8ks(tmp_path: Path) -> None:
    class Letters:
        start_id, context = 0, 100

        def encode(self, text: str) -> list[int]:
            return [ord(letter) for letter in text]

    line = {"question": "How many?", "answer": "3 and 4 make 7.\n#### 1,007"}
    path = write_lines(tmp_path / "gsm.jsonl", [line] * 10)
    (prompt, *_) = read_prompts(path, cast(Any, Letters()), 8)
    assert prompt.answer == "1007"
    assert prompt.is_right("I think it is 1,007.")
    assert not prompt.is_right("1007 or 8")


def test_a_prompt_that_a_template_wrote_has_one_first_token(tmp_path: Path) -> None:
    class Letters:
        start_id, context = ord("<"), 100

        def encode(self, text: str) -> list[int]:
            return [ord(letter) for letter in text]

    path = write_lines(tmp_path / "p.jsonl", [{"prompt": "<one"}, {"prompt": "one"}] * 5)
    first, second, *_ = read_prompts(path, cast(Any, Letters()), 8)
    assert first.ids == second.ids == tuple(map(ord, "<one"))
