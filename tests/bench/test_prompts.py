"""What is sent: lengths, datasets, and that variants get the same while repeats do not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from leanmoe.bench.prompts import DatasetRow, Supply, read_dataset
from leanmoe.bench.settings import Lengths, ServiceLoad
from leanmoe.core.errors import LeanMoeError

LOAD = ServiceLoad(50, concurrency=4)


class Words:
    """A tokenizer of one token a word."""

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [len(word) for word in text.split()]}


def supply(**changes: object) -> Supply:
    known = {"input_len": Lengths(8, 16), "output_len": Lengths(2, 5)}
    return Supply(range(10_000), **{**known, **changes})  # type: ignore[arg-type]


def test_lengths_are_within_the_ranges_and_prompts_are_text() -> None:
    drawn = supply().draw(LOAD, 0)
    assert len(drawn) == 50
    assert {len(r.prompt) for r in drawn} == set(range(8, 17))
    assert {r.output_tokens for r in drawn} == {2, 3, 4, 5}
    for request in drawn:
        first = request.prompt[0]
        assert request.prompt == tuple(range(first, first + len(request.prompt)))
    assert supply().longest == 21


def test_a_repeat_has_prompts_of_its_own_the_same_each_time() -> None:
    assert supply().draw(LOAD, 0) == supply().draw(LOAD, 0)
    assert supply().draw(LOAD, 0) != supply().draw(LOAD, 1)
    assert supply().draw(LOAD, 0) != supply(seed=1).draw(LOAD, 0)


def test_rows_are_taken_in_turn() -> None:
    rows = [DatasetRow(12, 3), DatasetRow((7, 8, 9), 4)]
    drawn = supply(rows=rows).draw(LOAD, 0)
    assert [(len(r.prompt), r.output_tokens) for r in drawn[:4]] == [(12, 3), (3, 4)] * 2
    assert drawn[1].prompt == (7, 8, 9)
    assert supply(rows=rows).longest == 15


def test_a_text_too_short_is_refused() -> None:
    with pytest.raises(LeanMoeError, match="prompts of 16 cannot be cut"):
        Supply(range(10), Lengths(8, 16), Lengths(2, 2))


def test_a_dataset_of_lengths_and_texts(tmp_path: Path) -> None:
    rows = [
        {"input_len": 100, "output_len": 20},
        {"prompt": "a bb ccc", "output": "one two three"},
        {"input_len": 7, "output_len": 1},
        {"prompt": "how long", "output_len": 5},
    ]
    path = tmp_path / "set.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    assert read_dataset(path, Words()) == [
        DatasetRow(100, 20),
        DatasetRow((1, 2, 3), 3),
        DatasetRow(7, 2),
        DatasetRow((3, 4), 5),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1 is not JSON"),
        ("[1]", "is a list: a file of JSON lines holds one object a line"),
        ('{"conversations": []}', "holds conversations, which are not read: it needs a prompt"),
        ('{"input_len": 5}', "needs a prompt"),
        ('{"input_len": -5, "output_len": 3}', "input_len -5"),
        ('{"input_len": true, "output_len": 3}', "input_len True"),
        ("", "has no rows"),
    ],
)
def test_a_bad_dataset_names_the_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "set.jsonl"
    path.write_text(line)
    with pytest.raises(LeanMoeError, match=message):
        read_dataset(path, Words())
