"""Held-out text as rows to score; the tasks beside it are those of task_files.py."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from leanmoe.core.errors import LeanMoeError
from leanmoe.scoring.rows import ScoredRow
from reference_model.prepare import split_documents
from reference_model.scoring import Scorer
from reference_model.task_files import BLIMP, LAMBADA, PIQA, PIQA_LABELS, QASC

TEXTS = {
    "novels": "novels_valid.txt",
    "msdocs": "msdocs_ccby_valid.txt",
    "peps": "peps_valid.txt",
    "textbooks": "textbooks_ccby_valid.txt",
    "wikitext2": "wikitext2_valid.txt",
}
FEWEST_DOCUMENTS = 10
"""A text of fewer documents is paired by passages of one context length instead."""


def require_files(folder: Path) -> None:
    """Names every file that is missing, before anything is loaded."""
    wanted = [*TEXTS.values(), LAMBADA, PIQA, PIQA_LABELS, QASC, BLIMP]
    missing = [name for name in wanted if not (folder / name).exists()]
    if not missing and not list((folder / BLIMP).glob("*.jsonl")):
        missing = [f"{BLIMP}/*.jsonl"]
    if missing:
        raise LeanMoeError(f"evaluation folder {folder} lacks {', '.join(missing)}")


@dataclass(frozen=True)
class Text:
    """A held-out text cut into windows, each belonging to one unit (document or passage)."""

    rows: list[ScoredRow]
    row_bytes: list[int]
    """UTF-8 bytes of each row's predicted tokens."""
    units: list[int]
    """Of each row, which unit it belongs to: 0, 1, 2 and so on."""
    unit_is: str
    documents: int
    words: int
    """Separated by white space."""

    @property
    def unit_bytes(self) -> npt.NDArray[np.float64]:
        """UTF-8 bytes of each unit."""
        sizes = np.array(self.row_bytes, dtype=np.float64)
        return np.bincount(self.units, weights=sizes).astype(np.float64)


def text_rows(scorer: Scorer, name: str, folder: Path) -> Text:
    """Windows of one held-out file: each token but the start token is predicted exactly once.

    A window holds at most the model's context and sees nothing before itself.
    """
    text = (folder / TEXTS[name]).read_text(encoding="utf-8")
    documents = split_articles(text) if name == "wikitext2" else split_documents(text)
    if not documents:
        raise LeanMoeError(f"{folder / TEXTS[name]} holds no documents")
    by_passage = len(documents) < FEWEST_DOCUMENTS
    rows: list[ScoredRow] = []
    units: list[int] = []
    for document in documents:
        ids = [scorer.start_id, *scorer.encode(document)]
        for start in range(0, len(ids) - 1, scorer.context):
            new_unit = by_passage or start == 0
            units.append((units[-1] if units else -1) + new_unit)
            rows.append(ScoredRow(tuple(ids[start : start + scorer.context + 1])))
    row_bytes = [int(scorer.bytes_per_id[list(row.ids[1:])].sum()) for row in rows]
    kind = "passage" if by_passage else "document"
    return Text(rows, row_bytes, units, kind, len(documents), len(text.split()))


def split_articles(text: str) -> list[str]:
    """WikiText's articles: each starts at a line like ` = Title = `."""
    parts = re.split(r"(?m)^(?= = [^=].*[^=] = ?$)", text)
    return [part for part in parts if part.strip()]


def first_windows(text: Text, tokens: int, seed: int) -> Text:
    """The first window of each unit, in a seeded order, until they hold `tokens` tokens."""
    _, firsts = np.unique(text.units, return_index=True)
    chosen: list[int] = []
    held = 0
    for row in np.random.default_rng(seed).permutation(firsts).tolist():
        if held >= tokens:
            break
        chosen.append(row)
        held += len(text.rows[row].ids) - 1
    return replace(
        text,
        rows=[text.rows[row] for row in chosen],
        row_bytes=[text.row_bytes[row] for row in chosen],
        units=list(range(len(chosen))),
    )
