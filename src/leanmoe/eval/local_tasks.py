"""Task files on disk as questions to score: BLiMP, LAMBADA, PIQA, QASC, as they are published.

    FOLDER/blimp/*.jsonl               pairs of sentences: is the good one the likelier?
    FOLDER/lambada_openai_test.jsonl   passages: is every token of the last word the likeliest?
    FOLDER/piqa_valid.jsonl            two solutions each, labels in piqa_valid-labels.lst
    FOLDER/qasc_dev.jsonl              eight answers each, asked without their facts

Of several answers the one counts as chosen that is likeliest per UTF-8 byte.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from leanmoe.core.errors import LeanMoeError, unknown_name
from leanmoe.scoring.rows import Score, ScoredRow

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


class Encoder:
    """A model's tokenizer; sequences start with its start token, or its end token if it has none.

    Raises LeanMoeError when it has neither.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        start = tokenizer.bos_token_id
        start = tokenizer.eos_token_id if start is None else start
        if start is None:
            raise LeanMoeError("the tokenizer has no start and no end token to start a text with")
        self.start_id = int(start)
        self.context = int(getattr(model.config, "max_position_embeddings", None) or 2048)
        self._tokenizer = tokenizer

    def encode(self, text: str) -> list[int]:
        """Token ids, with nothing added in front."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False, verbose=False)
        return ids


@dataclass(frozen=True)
class Item:
    """One question: a row per answer, and which of them is right."""

    rows: tuple[ScoredRow, ...]
    right: int = 0
    answer_bytes: tuple[int, ...] = ()
    """UTF-8 bytes of each answer, where likelihoods are compared per byte."""

    def is_right(self, scores: Sequence[Score]) -> bool:
        """Whether the right answer is chosen; the only answer, if each token is the likeliest."""
        if len(self.rows) == 1:
            return scores[0].greedy
        sizes = self.answer_bytes or (1,) * len(self.rows)
        losses = [score.nll / size for score, size in zip(scores, sizes, strict=True)]
        return min(range(len(losses)), key=losses.__getitem__) == self.right


@dataclass(frozen=True)
class Task:
    """Questions of one kind, and how they are judged."""

    name: str
    metric: str
    items: tuple[Item, ...]


def read_task(name: str, encoder: Encodes, folder: Path, limit: int | None = None) -> Task:
    """The task of that name from its files in `folder`; `limit`: its first so many questions.

    BLiMP's limit is for each paradigm. Raises LeanMoeError for an unknown name, a missing file or
    a line that is not as it must be.
    """
    if name not in LOCAL:
        raise unknown_name("local task", name, LOCAL)
    files, metric, read = LOCAL[name]
    for file in files:
        if not (folder / file).exists():
            raise LeanMoeError(f"task {name} needs {folder / file}, which does not exist")
    try:
        items = read(encoder, folder, limit)
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise LeanMoeError(
            f"task {name}: a line of {folder / files[0]} is not as it must be "
            f"({type(error).__name__}: {error})"
        ) from error
    if not items:
        raise LeanMoeError(f"task {name}: {folder / files[0]} holds no questions")
    return Task(name, metric, items)


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
    head = [encoder.start_id, *encoder.encode(context)]
    tail = encoder.encode(continuation)
    head = head[-(encoder.context + 1 - len(tail)) :]
    return ScoredRow((*head, *tail), first=len(head))


def _lines(path: Path, parse: Callable[[str], Any] = json.loads) -> list[Any]:
    lines = path.read_text(encoding="utf-8").splitlines()
    try:
        return [parse(line) for line in lines if line.strip()]
    except json.JSONDecodeError as error:
        raise LeanMoeError(f"{path} is not JSON lines: {error.msg}") from error


def _blimp(encoder: Encodes, folder: Path, limit: int | None) -> tuple[Item, ...]:
    pairs = blimp_pairs(encoder, folder, limit)
    return tuple(Item(pair) for paradigm in pairs.values() for pair in paradigm)


def _lambada(encoder: Encodes, folder: Path, limit: int | None) -> tuple[Item, ...]:
    return tuple(Item((row,)) for row in lambada_rows(encoder, folder, limit))


def _piqa(encoder: Encodes, folder: Path, limit: int | None) -> tuple[Item, ...]:
    return tuple(piqa_choices(encoder, folder)[:limit])


def _qasc(encoder: Encodes, folder: Path, limit: int | None) -> tuple[Item, ...]:
    return tuple(qasc_choices(encoder, folder)[:limit])


Reads = Callable[[Encodes, Path, int | None], tuple[Item, ...]]
LOCAL: dict[str, tuple[tuple[str, ...], str, Reads]] = {
    "blimp": ((BLIMP,), "the good sentence is the likelier", _blimp),
    "lambada": ((LAMBADA,), "every token of the last word is the likeliest", _lambada),
    "piqa": ((PIQA, PIQA_LABELS), "the right answer is the likeliest per byte", _piqa),
    "qasc": ((QASC,), "the right answer is the likeliest per byte", _qasc),
}
"""By name: the files, what counts as right, and how the files are read."""
