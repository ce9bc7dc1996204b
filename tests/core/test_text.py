"""Text: what is read, what is refused, and that the two parts never share a document."""

from __future__ import annotations

import argparse
import ast
import json
import subprocess
import typing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leanmoe.core.errors import LeanMoeError
from leanmoe.core.text import _DOCUMENTED, Document, _statements, read_corpus, split


def test_built_in_text_is_plenty_and_needs_no_network() -> None:
    corpus = read_corpus()
    assert len(corpus.documents) >= 200
    assert sum(len(d.text) for d in corpus.documents) > 1_000_000
    assert len({d.text for d in corpus.documents}) == len(corpus.documents)


def test_statements_come_in_the_order_of_ast_walk() -> None:
    """The documents, and so every split of them, stand on that order."""
    for module in (argparse, typing, subprocess):
        tree = ast.parse(Path(str(module.__file__)).read_bytes())
        every = [node for node in ast.walk(tree) if isinstance(node, _DOCUMENTED)]
        assert [node for node in _statements(tree) if isinstance(node, _DOCUMENTED)] == every
    odd = "match 1:\n case 1:\n  def a(): 'A'\ntry:\n def b(): 'B'\nexcept E:\n class C: 'C'\n"
    odd += "else:\n async def d(): 'D'\nfinally:\n def e():\n  with x:\n   def f(): 'F'\n"
    tree = ast.parse(odd)
    every = [node for node in ast.walk(tree) if isinstance(node, _DOCUMENTED)]
    assert [node for node in _statements(tree) if isinstance(node, _DOCUMENTED)] == every
    assert len(every) == 7


def test_plain_text_splits_at_separators(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\n<|endoftext|>\ntwo\n<|endoftext|>\n \n")
    assert [d.text for d in read_corpus(str(path)).documents] == ["one", "two"]


def test_plain_text_without_separators_becomes_sections(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    paragraphs = [f"{n} " + "word " * 300 for n in range(9)]
    path.write_text("\n\n".join(paragraphs))
    documents = read_corpus(str(path)).documents
    assert len(documents) == 3
    assert "".join(d.text for d in documents).count("word") == 2700


def test_json_lines_and_folders(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in "xyx"))
    (tmp_path / "b.md").write_text("prose")
    assert sorted(d.text for d in read_corpus(str(tmp_path)).documents) == ["prose", "x", "y"]


@pytest.mark.parametrize("name", ["a.json", "a.ndjson", "a.txt", "corpus"])
def test_json_lines_are_read_under_any_name(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("".join(json.dumps({"id": 1, "text": t}) + "\n" for t in ("one", "two")))
    assert [d.text for d in read_corpus(str(path)).documents] == ["one", "two"]


@pytest.mark.parametrize("start", ["{ is a brace", "[see] it", "[1] Smith", "{a: b}", '"said" he'])
def test_prose_that_starts_with_a_bracket_is_prose(tmp_path: Path, start: str) -> None:
    path = tmp_path / "a.txt"
    path.write_text(start + " word")
    assert [d.text for d in read_corpus(str(path)).documents] == [start + " word"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'[{"text": "one"}]', "line 1 is a list: .* one object a line"),
        ("a.txt", b'[\n {"text": "one"}\n]', "line 1 is not JSON: .* one object a line"),
        ("a.jsonl", b'{"text": 3}\n', "line 1 .* has no text"),
        ("a.jsonl", b"{oops\n", "line 1 is not JSON"),
        ("a.txt", b"caf\xe9", "not UTF-8 text: byte 3 is invalid"),
        ("a.txt", b"\xff\xfex", "not UTF-8"),
        ("a.txt", "one two".encode("utf-16-le"), "not UTF-8 text: it holds zeros"),
        ("a.txt", b'["one", "two"]', "line 1 is a list: .* one object a line"),
        ("a.jsonl", b'{"messages": []}', r"\(fields 'messages'\) has no text"),
        ("a.jsonl", b'{"text": "half \\ud83d of one"}', "line 1 holds half of a character"),
        ("a.txt", b"  \n", "holds no words"),
    ],
)
def test_bad_text_is_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(LeanMoeError, match=message):
        read_corpus(str(tmp_path / name))


def test_missing_file_is_refused() -> None:
    with pytest.raises(LeanMoeError, match=r"nowhere\.txt does not exist"):
        read_corpus("nowhere.txt")


@given(
    lengths=st.lists(st.integers(1, 500), min_size=2, max_size=30),
    share=st.floats(0.05, 0.95),
    seed=st.integers(0, 5),
)
def test_split_deals_every_document_once(lengths: list[int], share: float, seed: int) -> None:
    documents = tuple(Document(str(n), "x" * size) for n, size in enumerate(lengths))
    calibration, heldout = split(documents, share, seed)
    assert sorted(d.name for d in calibration + heldout) == sorted(d.name for d in documents)
    assert calibration
    assert heldout
    assert (calibration, heldout) == split(documents, share, seed)


def test_one_document_cannot_be_split() -> None:
    with pytest.raises(LeanMoeError, match="at least 2"):
        split((Document("a", "text"),), 0.5, 0)
