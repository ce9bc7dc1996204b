"""Where calibration and held-out text comes from: documents, split so that neither sees the other.

Four kinds of text are on every machine that runs Python, no network needed: see `BUILT_IN`.
Needs no torch.
"""

from __future__ import annotations

import ast
import random
import re
import sysconfig
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import distributions
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from leanmoe.core.errors import LeanMoeError, first_line, shown
from leanmoe.core.files import read_json_lines, read_text

SEPARATOR = "<|endoftext|>"
SECTION_CHARACTERS = 4000
SHORTEST_CHARACTERS = 600
"""Built-in documents that are shorter are left out: too little to predict from."""
LONGEST_MODULE = 12_000
"""Characters of a module's code that are read, from its start: many modules, not much of each."""
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
TEXT_FIELDS = ("text", "content", "document")
LINES = (".jsonl", ".ndjson")
PROBED_CHARACTERS = 4096
"""Of a file's start, to see whether it holds JSON."""
GRAM_WORDS = 13
"""Words of which no run should stand in two documents, as in the overlap studies of GPT-3 (arXiv
2005.14165, appendix C)."""
NEAR_DUPLICATE = 0.2
"""A document is left out if longer ones hold this share of its runs of 13 words."""
MOST_GRAMS = 4_000_000
"""Of larger texts an even sample of the runs is compared."""
FEWEST_SOURCES = 40
"""With fewer sources in a text (one book) its documents are the units; each half needs 20."""

Hashes = NDArray[np.uint64]


@dataclass(frozen=True)
class Document:
    """One text whose parts belong together."""

    name: str
    text: str
    source: str = ""
    """The package, book or site that it is from: what statistics are paired by."""

    @property
    def unit(self) -> str:
        """Its source; a document without one stands for itself."""
        return self.source or self.name


@dataclass(frozen=True)
class Corpus:
    """Documents and a sentence on where they came from."""

    source: str
    documents: tuple[Document, ...]


def kind_of_text(name: str, text: str) -> tuple[str, str]:
    """Reads "docs=FILE" as a kind of text and its source; "FILE" is of the kind that it is named.

    Raises LeanMoeError where a name is given and nothing behind it.
    """
    kind, _, source = text.partition("=")
    if "=" not in text or not re.fullmatch(r"[\w.-]+", kind):
        return Path(text).stem.split(":")[0], text
    if not source:
        raise LeanMoeError(f"{name} is {text!r}: it must be SOURCE or KIND=SOURCE")
    return kind, source


def read_corpus(source: str | None = None) -> Corpus:
    """Reads documents from `source`.

    None or "python": Python's reference prose and docstrings; "topics", "docstrings", "code" or
    "readmes": one built-in kind. A .txt file: documents between lines of <|endoftext|>, else
    sections of about 4,000 characters. A .jsonl file, or one that starts as JSON does: one document
    a line in "text", "content" or "document", from the "source" or the site of the "url" that the
    line names. A folder: its .txt, .md and .jsonl files. Anything else: a Hugging Face data set
    NAME[:CONFIG[:SPLIT]], which is downloaded unless cached.

    Raises LeanMoeError when nothing readable is there. Near-duplicates are dropped.
    """
    return read_kinds({"": source})[""]


def read_kinds(sources: Mapping[str, str | None]) -> dict[str, Corpus]:
    """Reads a text of each kind; a document that others of any kind nearly hold is dropped.

    Raises LeanMoeError as `read_corpus`.
    """
    raw = {kind: _read(source or "python") for kind, source in sources.items()}
    everything = [document for corpus in raw.values() for document in corpus.documents]
    is_kept = iter(_without_near_duplicates(everything))
    kinds = {}
    for kind, corpus in raw.items():
        documents = tuple(each for each in corpus.documents if next(is_kept))
        if not documents:
            shown = sources[kind] or "python"
            raise LeanMoeError(f"text {shown} holds no words: give a file with documents")
        if len({each.unit for each in documents}) < FEWEST_SOURCES:
            documents = tuple(replace(each, source="") for each in documents)
        kinds[kind] = Corpus(corpus.source, documents)
    return kinds


def split(
    documents: Sequence[Document], heldout_share: float, seed: int
) -> tuple[tuple[Document, ...], tuple[Document, ...]]:
    """Deals whole sources into calibration and held-out parts; the same seed, the same split.

    The held-out part gets about `heldout_share` of the sources, and at least one.
    """
    by_source: dict[str, list[Document]] = {}
    for document in documents:
        by_source.setdefault(document.unit, []).append(document)
    if len(by_source) < 2:
        raise LeanMoeError(
            f"the text has {len(by_source)} document: at least 2 are needed, "
            "one part to search on and one to prove on"
        )
    order = list(by_source.values())
    random.Random(seed).shuffle(order)
    kept = len(order) - min(max(round(heldout_share * len(order)), 1), len(order) - 1)
    calibration, heldout = (
        tuple(document for source in part for document in source)
        for part in (order[:kept], order[kept:])
    )
    return calibration, heldout


def overlap(documents: Sequence[Document], others: Sequence[Document]) -> float:
    """The share of the documents' runs of 13 words that stand in `others`."""
    grams = np.concatenate([_grams(each.text) for each in documents])
    theirs = np.concatenate([_grams(each.text) for each in others])
    return float(np.isin(grams, theirs).mean())


def _without_near_duplicates(documents: Sequence[Document]) -> list[bool]:
    """Whether each document is kept: few of its runs of 13 words stand in longer documents.

    Longer ones count whether or not they are kept; of two that are equal the first is.
    """
    order = sorted(range(len(documents)), key=lambda n: -len(documents[n].text))
    parts = [_grams(documents[n].text) for n in order]
    step = 1 + sum(map(len, parts)) // MOST_GRAMS
    parts = [part if step == 1 else part[part % np.uint64(step) == 0] for part in parts]
    owners = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    _, first, of_gram = np.unique(np.concatenate(parts), return_index=True, return_inverse=True)
    repeated = owners[first][of_gram] < owners
    counts = np.bincount(owners, minlength=len(parts))
    seen = np.bincount(owners, repeated, minlength=len(parts)) / np.maximum(counts, 1)
    kept = [False] * len(documents)
    for place, number in enumerate(order):
        kept[number] = bool(documents[number].text.strip()) and seen[place] < NEAR_DUPLICATE
    return kept


def _grams(text: str) -> Hashes:
    """A hash of each run of 13 words, of all words where they are fewer."""
    words = [zlib.crc32(word.encode()) for word in re.findall(r"\w+", text.lower()) or [text]]
    hashes = np.array(words, dtype=np.uint64)
    run = min(GRAM_WORDS, len(words))
    grams = np.zeros(len(words) - run + 1, dtype=np.uint64)
    for place in range(run):
        grams = grams * np.uint64(0x100000001B3) + hashes[place : place + len(grams)]
    return grams


def _read(source: str) -> Corpus:
    if source in BUILT_IN:
        read, described = BUILT_IN[source]
        documents = list(read())
    elif Path(source).exists():
        documents, described = list(_local(Path(source))), Path(source).name
    elif Path(source).suffix in (".txt", ".json", ".md", *LINES) or source.startswith(
        (".", "/", "~")
    ):
        raise LeanMoeError(f"text {source} does not exist")
    else:
        documents, described = list(_hub_dataset(source)), f"Hugging Face data set {source}"
    if not documents:
        raise LeanMoeError(f"text {source} holds no words: give a file with documents")
    return Corpus(described, tuple(documents))


def _reference_prose() -> Iterator[Document]:
    from pydoc_data import topics

    for name, text in sorted(topics.topics.items()):
        for number, section in enumerate(sections(text.strip(), "\n\n")):
            yield Document(f"topic {name} {number}", section, "Python's reference")


@dataclass(frozen=True)
class _Module:
    """A module of the standard library, read from its source without importing."""

    name: str
    docstrings: str
    code: str
    """Its source without the docstrings."""


@cache
def _modules() -> tuple[_Module, ...]:
    library = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data", "turtledemo"}
    modules = []
    for path in sorted(library.rglob("*.py")):
        inside = path.relative_to(library)
        if left_out & set(inside.parts) or any(part.startswith("_") for part in inside.parts[:-1]):
            continue
        try:
            text = path.read_text(encoding="utf-8")
            tree = ast.parse(text)
        except (SyntaxError, ValueError):
            continue
        texts, lines = [], text.splitlines()
        for node in _statements(tree):
            if isinstance(node, _DOCUMENTED) and (docstring := ast.get_docstring(node)):
                texts.append(docstring)
                at = node.body[0]
                for line in range(at.lineno - 1, at.end_lineno or at.lineno):
                    lines[line] = ""
        name = ".".join(inside.with_suffix("").parts)
        modules.append(_Module(name, "\n\n".join(texts), "\n".join(filter(str.strip, lines))))
    return tuple(modules)


def _of_modules(part: Callable[[_Module], str]) -> Iterator[Document]:
    for module in _modules():
        if len(text := part(module)) >= SHORTEST_CHARACTERS:
            yield Document(f"module {module.name}", text, module.name.partition(".")[0])


def _docstrings() -> Iterator[Document]:
    return _of_modules(lambda module: module.docstrings)


def _code() -> Iterator[Document]:
    return _of_modules(lambda module: module.code[:LONGEST_MODULE])


def _readmes() -> Iterator[Document]:
    """The long descriptions of installed packages, by name."""
    texts = {}
    for package in distributions():
        body = package.metadata.get_payload()  # type: ignore[attr-defined]
        texts[str(package.metadata["Name"])] = str(package.metadata["Description"] or body or "")
    for name, text in sorted(texts.items()):
        if len(text.strip()) >= SHORTEST_CHARACTERS:
            yield Document(f"README of {name}", text.strip(), name)


def _prose_and_docstrings() -> Iterator[Document]:
    yield from _reference_prose()
    yield from _docstrings()


BUILT_IN: Mapping[str, tuple[Callable[[], Iterator[Document]], str]] = {
    "topics": (_reference_prose, "Python's reference prose (pydoc topics)"),
    "docstrings": (_docstrings, "standard library docstrings"),
    "code": (_code, "standard library code without its docstrings"),
    "readmes": (_readmes, "READMEs of the installed packages"),
    "python": (
        _prose_and_docstrings,
        "Python's reference prose (pydoc topics) and standard library docstrings",
    ),
}
KINDS = ("topics", "docstrings", "code", "readmes")
"""Kinds of text that are on every machine: what a claim is made for where none is given."""


def _statements(tree: ast.Module) -> Iterator[ast.AST]:
    """As `ast.walk`, in its order, but not into expressions: they hold no docstrings."""
    left: deque[ast.AST] = deque([tree])
    while left:
        node = left.popleft()
        for field in ("body", "handlers", "cases", "orelse", "finalbody"):
            left.extend(getattr(node, field, ()))
        yield node


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
    is_one = SEPARATOR not in text
    parts = sections(text, "\n\n") if is_one else text.split(SEPARATOR)
    for number, part in enumerate(parts):
        if part.strip():
            yield Document(f"{path.name} {number}", part.strip(), str(path) if is_one else "")


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
        name = f"{path.name} {where.rpartition(' ')[2]}"
        yield Document(name, _text_of(row, where), _source_of(row))


def _text_of(row: object, where: str) -> str:
    if isinstance(row, dict):
        for field in TEXT_FIELDS:
            if isinstance(row.get(field), str):
                return str(row[field])
        where += f" (fields {shown(', '.join(map(str, row)))})"
    raise LeanMoeError(f"{where} has no text: one of {', '.join(TEXT_FIELDS)} must be a string")


def _source_of(row: object) -> str:
    """The "source" that a row names, or the site of its "url"; none where it has neither."""
    if not isinstance(row, dict):
        return ""
    source, url = row.get("source"), row.get("url")
    if isinstance(source, str):
        return source
    return urlsplit(url).hostname or "" if isinstance(url, str) else ""


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
        raise LeanMoeError(
            f"text {source} is no file and no data set that can be loaded: {first_line(error)}"
        ) from error
    for number, row in enumerate(rows):
        text = _text_of(row, f"{source} row {number}")
        yield Document(f"{name} {number}", text, _source_of(row))
