"""What is sent: prompts of real text and how many tokens each reply has. Needs no torch.

Prompts are slices of text and not random ids, because what a router does depends on the text. Each
repeat has prompts of its own, the same for every variant: a server that keeps prefixes would know
the prompts of the repeat before.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leanmoe.bench.measurement import Request
from leanmoe.bench.settings import MOST_TOKENS, Lengths, ServiceLoad
from leanmoe.core.errors import LeanMoeError, shown
from leanmoe.core.files import read_json_lines
from leanmoe.core.progress import bar
from leanmoe.core.text import read_corpus

ENOUGH_TOKENS = 400_000
"""Of text to draw prompts from; more is not tokenised."""
ROW_NEEDS = (
    "needs a prompt (input_len or the text prompt) and a reply (output_len or the text output)"
)


@dataclass(frozen=True)
class DatasetRow:
    """One row of a dataset: a prompt's ids or only its length, and its reply's length."""

    prompt: tuple[int, ...] | int
    output_tokens: int


class Supply:
    """Draws the requests of a run: the same for every variant, others for each repeat."""

    def __init__(
        self,
        stream: Sequence[int],
        input_len: Lengths,
        output_len: Lengths,
        rows: Sequence[DatasetRow] = (),
        seed: int = 0,
    ) -> None:
        self._stream = tuple(stream)
        self._input, self._output = input_len, output_len
        self._rows, self._seed = tuple(rows), seed
        cut = self._longest_cut
        if len(self._stream) <= cut:
            raise LeanMoeError(
                f"the text has {len(self._stream):,} tokens: prompts of {cut:,} "
                "cannot be cut from it; give more with --text"
            )

    @property
    def longest_prompt(self) -> int:
        """Tokens of the longest prompt there can be."""
        if self._rows:
            return max(_length(row.prompt) for row in self._rows)
        return self._input.high

    @property
    def _longest_cut(self) -> int:
        """Tokens of the longest prompt that is cut from the text."""
        if not self._rows:
            return self._input.high
        return max((row.prompt for row in self._rows if isinstance(row.prompt, int)), default=0)

    @property
    def longest(self) -> int:
        """Tokens of the longest request there can be, prompt and reply."""
        if self._rows:
            return max(_length(row.prompt) + row.output_tokens for row in self._rows)
        return self._input.high + self._output.high

    def draw(self, load: ServiceLoad, repeat: int | str, count: int | None = None) -> list[Request]:
        """The requests of one repeat (or of the warm-up) at one load."""
        rng = random.Random(f"{self._seed} {load.name} {repeat}")
        made = []
        for number in range(count or load.requests):
            if self._rows:
                row = self._rows[number % len(self._rows)]
                prompt = self._prompt(row.prompt, rng)
                made.append(Request(prompt, row.output_tokens))
            else:
                prompt = self._prompt(self._input.draw(rng), rng)
                made.append(Request(prompt, self._output.draw(rng)))
        return made

    def _prompt(self, prompt: tuple[int, ...] | int, rng: random.Random) -> tuple[int, ...]:
        if isinstance(prompt, tuple):
            return prompt
        first = rng.randrange(len(self._stream) - prompt)
        return self._stream[first : first + prompt]


def read_stream(source: str | None, tokenizer: Any) -> tuple[str, list[int]]:
    """Where the text comes from, and its token ids, documents one after the other."""
    corpus = read_corpus(source)
    stream: list[int] = []
    order = list(corpus.documents)
    random.Random(0).shuffle(order)
    with bar("Reading text", len(order), "documents") as advance:
        for document in order:
            if len(stream) < ENOUGH_TOKENS:
                stream += encode(tokenizer, document.text)
            advance(1)
    return corpus.source, stream


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text, without what the tokenizer would add."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def read_dataset(path: Path, tokenizer: Any) -> list[DatasetRow]:
    """Rows of a .jsonl file. Raises LeanMoeError naming the line and what a row needs.

    A row has a prompt's length (`input_len`) or text (`prompt`), and a reply's length
    (`output_len`) or text (`output`). Replies of one token become two: a time per output token
    needs two.
    """
    rows = [_row(value, where, tokenizer) for where, value in read_json_lines(path, "dataset")]
    if not rows:
        raise LeanMoeError(f"dataset {path} has no rows")
    return rows


def _row(value: dict[str, Any], where: str, tokenizer: Any) -> DatasetRow:
    if "conversations" in value:
        raise LeanMoeError(f"{where} holds conversations, which are not read: it {ROW_NEEDS}")
    prompt, output = (_count(value, field, where) for field in ("input_len", "output_len"))
    texts = (value.get("prompt"), value.get("output"))
    text, reply = (each if isinstance(each, str) else "" for each in texts)
    if (prompt is None and not text) or (output is None and not reply):
        raise LeanMoeError(f"{where} {ROW_NEEDS}")
    ids = tuple(encode(tokenizer, text)) if text else None
    if output is None:
        output = len(encode(tokenizer, reply))
    return DatasetRow(ids or prompt or 1, max(output, 2))


def _count(value: dict[str, Any], field: str, where: str) -> int | None:
    found = value.get(field)
    if found is None:
        return None
    if isinstance(found, bool) or not isinstance(found, int) or not 1 <= found <= MOST_TOKENS:
        raise LeanMoeError(
            f"{where} has {field} {shown(found)}: it must be a number of tokens, "
            f"1 to {MOST_TOKENS:,}"
        )
    return found


def _length(prompt: tuple[int, ...] | int) -> int:
    return prompt if isinstance(prompt, int) else len(prompt)
