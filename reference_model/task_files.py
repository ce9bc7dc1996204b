"""Task files on disk as rows to score: BLiMP, LAMBADA, PIQA, QASC, as they are published.

FOLDER/blimp/*.jsonl               pairs of sentences: is the good one the likelier?
FOLDER/lambada_openai_test.jsonl   passages: is every token of the last word the likeliest?
FOLDER/piqa_valid.jsonl            two solutions each, labels in piqa_valid-labels.lst
FOLDER/qasc_dev.jsonl              eight answers each, asked without their facts
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from leanmoe.core.errors import LeanMoeError
from leanmoe.scoring.rows import ScoredRow

LAMBADA = "lambada_openai_test.jsonl"
PIQA, PIQA_LABELS = "piqa_valid.jsonl", "piqa_valid-labels.lst"
QASC = "qasc_dev.jsonl"
BLIMP = "blimp"


class Encodes(Protocol):
    """What makes token ids of text."""

    start_id: int
    """The token every sequence starts with."""
    context: int
    """Tokens the model reads at most."""

    def encode(self, text: str) -> list[int]:
        """Token ids, with nothing added in front."""


@dataclass(frozen=True)
class Item:
    """One question: a row per answer, and which of them is right."""

    rows: tuple[ScoredRow, ...]
    right: int
    answer_bytes: tuple[int, ...]
    """UTF-8 bytes of each answer."""


def lambada_rows(encoder: Encodes, folder: Path, limit: int | None = None) -> list[ScoredRow]:
    """Passages whose last word (with the space before it) is to be predicted."""
    rows: list[ScoredRow] = []
    for item in _lines(folder / LAMBADA)[:limit]:
        context, word = item["text"].rsplit(" ", 1)
        rows.append(_continued(encoder, context, f" {word}"))
    return rows


def piqa_choices(encoder: Encodes, folder: Path) -> list[Item]:
    """PIQA as `Question: goal`, `Answer: solution`."""
    labels = (folder / PIQA_LABELS).read_text().split()
    return [
        _choice(encoder, item["goal"], [item["sol1"], item["sol2"]], int(label))
        for item, label in zip(_lines(folder / PIQA), labels, strict=True)
    ]


def qasc_choices(encoder: Encodes, folder: Path) -> list[Item]:
    """QASC's eight choices after the question alone, without its facts."""
    questions: list[Item] = []
    for item in _lines(folder / QASC):
        options = item["question"]["choices"]
        right = [option["label"] for option in options].index(item["answerKey"])
        answers = [option["text"] for option in options]
        questions.append(_choice(encoder, item["question"]["stem"], answers, right))
    return questions


def blimp_pairs(
    encoder: Encodes, folder: Path, limit: int | None = None
) -> dict[str, list[tuple[ScoredRow, ScoredRow]]]:
    """By paradigm: the good and the bad sentence of each pair."""

    def whole(sentence: str) -> ScoredRow:
        return ScoredRow((encoder.start_id, *encoder.encode(sentence)))

    return {
        file.stem: [
            (whole(item["sentence_good"]), whole(item["sentence_bad"]))
            for item in _lines(file)[:limit]
        ]
        for file in sorted((folder / BLIMP).glob("*.jsonl"))
    }


def _choice(encoder: Encodes, question: str, answers: Sequence[str], right: int) -> Item:
    prompt = f"Question: {question}\nAnswer:"
    rows = tuple(_continued(encoder, prompt, f" {answer}") for answer in answers)
    return Item(rows, right, tuple(len(f" {answer}".encode()) for answer in answers))


def _continued(encoder: Encodes, context: str, continuation: str) -> ScoredRow:
    """Cut into tokens as lm-evaluation-harness does it (`TemplateLM._encode_pair`), both in one.

    A tokenizer that puts a space before every text reads the continuation alone as another.
    """
    ids = encoder.encode(context)
    tail = encoder.encode(context + continuation)[len(ids) :]
    head = [encoder.start_id, *ids]
    head = head[-(encoder.context + 1 - len(tail)) :]
    return ScoredRow((*head, *tail), first=len(head))


def _lines(path: Path) -> list[Any]:
    lines = path.read_text(encoding="utf-8-sig").split("\n")
    try:
        return [json.loads(line) for line in lines if line.strip()]
    except json.JSONDecodeError as error:
        raise LeanMoeError(f"{path} is not JSON lines: {error.msg}") from error
