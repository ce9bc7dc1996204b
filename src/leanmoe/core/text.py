"""Where calibration and held-out text comes from: documents, split so that neither sees the other.

Without a source, the text is Python's own reference prose and the standard library's docstrings:
on every machine that runs Python, no network needed. Needs no torch.
"""

from __future__ import annotations

import ast
import hashlib
import random
import re
import sysconfig
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from leanmoe.core.errors import LeanMoeError, shown
from leanmoe.core.files import read_json_lines, read_text

SEPARATOR = "<|endoftext|>"
BUILT_IN = "python"
SECTION_CHARACTERS = 4000
MODULE_CHARACTERS = 600
"""Modules whose docstrings are shorter than this are left out: too little to predict from."""
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
TEXT_FIELDS = ("text", "content", "document")
LINES = (".jsonl", ".ndjson")
PROBED_CHARACTERS = 4096
"""Of a file's start, to see whether it holds JSON."""


@dataclass(frozen=True)
class Document:
    """One text whose parts belong together; statistics are paired by document."""

    name: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """Documents and a sentence on where they came from."""

    source: str
    documents: tuple[Document, ...]


def read_corpus(source: str | None = None) -> Corpus:
    """Reads documents from `source`.

    None or "python": Python's reference prose and docstrings. A .txt file: documents between
    lines of <|endoftext|>, else sections of about 4,000 characters. A .jsonl file, or one that
    starts as JSON does: one document a line in "text", "content" or "document". A folder: its .txt,
    .md and .jsonl files. Anything else: a Hugging Face data set NAME[:CONFIG[:SPLIT]], which is
    downloaded unless cached.

    Raises LeanMoeError when nothing readable is there. Exact duplicates are dropped.
    """
    if source is None or source == BUILT_IN:
        documents = [*_reference_prose(), *_docstrings()]
        described = "Python's reference prose (pydoc topics) and standard library docstrings"
    elif Path(source).exists():
        documents = list(_local(Path(source)))
        described = Path(source).name
    elif Path(source).suffix in (".txt", ".json", ".md", *LINES) or source.startswith(
        (".", "/", "~")
    ):
        raise LeanMoeError(f"text {source} does not exist")
    else:
        documents = list(_hub_dataset(source))
        described = f"Hugging Face data set {source}"
    unique = _without_duplicates(documents)
    if not unique:
        raise LeanMoeError(f"text {source or BUILT_IN} holds no words: give a file with documents")
    return Corpus(described, unique)


def split(
    documents: Sequence[Document], heldout_share: float, seed: int
) -> tuple[tuple[Document, ...], tuple[Document, ...]]:
    """Deals whole documents into calibration and held-out parts; the same seed, the same split.

    The held-out part gets about `heldout_share` of all characters, and at least one document.
    """
    if len(documents) < 2:
        raise LeanMoeError(
            f"the text has {len(documents)} document: at least 2 are needed, "
            "one part to search on and one to prove on"
        )
    order = list(documents)
    random.Random(seed).shuffle(order)
    wanted = heldout_share * sum(len(d.text) for d in order)
    heldout: list[Document] = []
    while len(order) > 1 and (not heldout or sum(len(d.text) for d in heldout) < wanted):
        heldout.append(order.pop())
    return tuple(order), tuple(heldout)


def _reference_prose() -> Iterator[Document]:
    from pydoc_data import topics

    for name, text in sorted(topics.topics.items()):
        yield Document(f"topic {name}", text.strip())


def _docstrings() -> Iterator[Document]:
    """The docstrings of each standard library module, read from its source without importing."""
    library = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data", "turtledemo"}
    for path in sorted(library.rglob("*.py")):
        inside = path.relative_to(library)
        if left_out & set(inside.parts) or any(part.startswith("_") for part in inside.parts[:-1]):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        texts = [text for node in _statements(tree) if (text := _docstring(node))]
        joined = "\n\n".join(texts)
        if len(joined) >= MODULE_CHARACTERS:
            yield Document(f"module {'.'.join(inside.with_suffix('').parts)}", joined)


def _statements(tree: ast.Module) -> Iterator[ast.AST]:
    """As `ast.walk`, in its order, but not into expressions: they hold no docstrings."""
    left: deque[ast.AST] = deque([tree])
    while left:
        node = left.popleft()
        for field in ("body", "handlers", "cases", "orelse", "finalbody"):
            left.extend(getattr(node, field, ()))
        yield node


def _docstring(node: ast.AST) -> str | None:
    return ast.get_docstring(node) if isinstance(node, _DOCUMENTED) else None


def _local(path: Path) -> Iterator[Document]:
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in (".txt", ".md", *LINES))
        if not files:
            raise LeanMoeError(f"text folder {path} holds no .txt, .md or .jsonl file")
        for file in files:
            yield from _local(file)
    elif path.suffix in (".json", *LINES) or _holds_json_lines(path):
        yield from _json_lines(path)
    else:
        yield from _plain(path)


def _holds_json_lines(path: Path) -> bool:
    """Whether a file of another name starts with JSON: it is not prose, which a model may read."""
    start = read_text(path, "text").lstrip()[:PROBED_CHARACTERS]
    if re.match(r"\[\s*(?:\{\s*)?\"", start):
        return True
    first = start.split("\n", 1)[0]
    return re.match(r"\{\s*\"[^\"]*\"\s*:", first) is not None


def _plain(path: Path) -> Iterator[Document]:
    text = read_text(path, "text")
    parts = text.split(SEPARATOR) if SEPARATOR in text else sections(text, "\n\n")
    for number, part in enumerate(parts):
        if part.strip():
            yield Document(f"{path.name} {number}", part.strip())


def sections(text: str, separator: str) -> Iterator[str]:
    """Whole paragraphs, gathered until a section is long enough; the last one may be short."""
    gathered: list[str] = []
    for paragraph in text.split(separator):
        gathered.append(paragraph)
        if sum(map(len, gathered)) >= SECTION_CHARACTERS:
            yield separator.join(gathered)
            gathered = []
    yield separator.join(gathered)


def _json_lines(path: Path) -> Iterator[Document]:
    for where, row in read_json_lines(path, "text"):
        yield Document(f"{path.name} {where.rpartition(' ')[2]}", _text_of(row, where))


def _text_of(row: object, where: str) -> str:
    if isinstance(row, dict):
        for field in TEXT_FIELDS:
            if isinstance(row.get(field), str):
                return str(row[field])
        where += f" (fields {shown(', '.join(map(str, row)))})"
    raise LeanMoeError(f"{where} has no text: one of {', '.join(TEXT_FIELDS)} must be a string")


def _hub_dataset(source: str) -> Iterator[Document]:
    name, _, rest = source.partition(":")
    config, _, part = rest.partition(":")
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise LeanMoeError(
            f"text {source} is not a file; to read it as a Hugging Face data set, "
            "`pip install datasets`, or give a .txt or .jsonl file"
        ) from error
    try:
        rows = load_dataset(name, config or None, split=part or "test")
    except Exception as error:  # the hub client raises errors of many kinds
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise LeanMoeError(
            f"text {source} is neither a file nor a data set that can be loaded: {reason[0]}"
        ) from error
    for number, row in enumerate(rows):
        yield Document(f"{name} {number}", _text_of(row, f"{source} row {number}"))


def _without_duplicates(documents: Sequence[Document]) -> tuple[Document, ...]:
    """The first of each text: a copy on both sides of the split would be no held-out text."""
    seen: set[bytes] = set()
    unique = []
    for document in documents:
        digest = hashlib.sha256(document.text.encode()).digest()
        if document.text.strip() and digest not in seen:
            seen.add(digest)
            unique.append(document)
    return tuple(unique)
