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
from leanmoe.core.text import (
    _DOCUMENTED,
    KINDS,
    Document,
    _statements,
    kind_of_text,
    overlap,
    read_corpus,
    read_kinds,
    split,
)


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
    paragraphs = [" ".join(f"word{n}{m}" for m in range(150)) for n in range(9)]
    path.write_text("\n\n".join(paragraphs))
    documents = read_corpus(str(path)).documents
    assert len(documents) == 3
    assert "".join(d.text for d in documents).count("word") == 1350


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


def words(start: int, count: int) -> str:
    return " ".join(f"w{n}" for n in range(start, start + count))


def test_a_document_that_longer_ones_hold_is_dropped_whatever_its_kind(tmp_path: Path) -> None:
    texts = {
        "long": [words(0, 200)],
        "other": [words(50, 60), words(500, 100), words(100, 80) + " " + words(900, 40), "w3 w4"],
    }
    for name, rows in texts.items():
        lines = [json.dumps({"text": text}) + "\n" for text in rows]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    kinds = read_kinds({name: str(tmp_path / f"{name}.jsonl") for name in texts})
    assert len(kinds["long"].documents) == 1
    kept = [document.text for document in kinds["other"].documents]
    assert kept == [words(500, 100), "w3 w4"], "whole in another, or by more than a fifth"


def test_overlap_is_the_share_of_runs_of_13_words() -> None:
    one, half = Document("a", words(0, 112)), Document("b", words(50, 112))
    assert overlap([one], [half]) == pytest.approx(50 / 100)
    assert overlap([one], [Document("c", words(500, 90))]) == 0


def test_a_source_is_never_in_both_halves(tmp_path: Path) -> None:
    rows = [
        {"text": words(100 * n, 50), "url": f"https://site{n % 45}.org/{n}"} for n in range(135)
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    documents = read_corpus(str(path)).documents
    calibration, heldout = split(documents, 0.4, 0)
    assert {d.unit for d in heldout}.isdisjoint(d.unit for d in calibration)
    assert len({d.unit for d in heldout}) == 18
    path.write_text("".join(json.dumps(row | {"source": "one"}) + "\n" for row in rows))
    assert {d.source for d in read_corpus(str(path)).documents} == {""}, "too few to be units"


def test_four_kinds_are_on_every_machine_and_hardly_overlap() -> None:
    kinds = read_kinds({kind: kind for kind in KINDS})
    halves = {kind: split(corpus.documents, 0.5, 0) for kind, corpus in kinds.items()}
    calibration = [document for half, _ in halves.values() for document in half]
    for kind, (_, heldout) in halves.items():
        assert sum(len(document.text) for document in heldout) > 100_000, kind
        assert len({document.unit for document in heldout}) >= 20, kind
    assert overlap([d for _, half in halves.values() for d in half], calibration) < 0.02
    assert not any('"""' in document.text[:3] for document in kinds["code"].documents)


@pytest.mark.parametrize(
    ("words", "kind", "source"),
    [
        ("docs=a/b.txt", "docs", "a/b.txt"),
        ("a/b.txt", "b", "a/b.txt"),
        ("code", "code", "code"),
        ("a/x=1/b.txt", "b", "a/x=1/b.txt"),
        ("owner/name:config", "name", "owner/name:config"),
    ],
)
def test_a_kind_of_text_has_a_name(words: str, kind: str, source: str) -> None:
    assert kind_of_text("--text", words) == (kind, source)


def test_a_kind_without_a_text_is_refused() -> None:
    with pytest.raises(LeanMoeError, match="it must be SOURCE or KIND=SOURCE"):
        kind_of_text("--text", "docs=")
