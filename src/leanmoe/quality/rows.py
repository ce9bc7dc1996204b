"""Log-likelihoods of continuations, run as a service would have run them.

A row is a prompt and the tokens that are predicted after it. In a call, rows are set so that their
predictions start in the same column: what is before it is a prompt, which `apply` runs under the
rules for prompts; what is after decodes, and every `decode_batch` neighbours decode together.
Neighbours are from different questions, drawn by a seed: which other requests a token meets is
chance in a service too.

Letters: N rows of a call, L columns, T predicted tokens, D hidden width.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from leanmoe.errors import LeanMoeError
from leanmoe.progress import bar
from leanmoe.quality.head import Head

BATCH_TOKENS = 8192
"""Columns times rows of one forward call, unless the rows that decode together need more."""
STEPS_APART = 16
"""Steps among which a question's answers are dealt, so that they do not keep each other company."""
LENGTH_STEP = 4
"""Rows whose continuations differ by less count as equally long when they are sorted."""

Applying = Callable[[int], AbstractContextManager[Any]]
"""What sets the model up for calls with so many prompt tokens."""


@dataclass(frozen=True)
class Row:
    """A sequence of which `ids[first:]` is predicted, each token from all before it."""

    ids: tuple[int, ...]
    first: int = 1

    @property
    def prompt(self) -> int:
        """Tokens whose own next-token prediction nobody reads."""
        return self.first - 1

    @property
    def reply(self) -> int:
        """Predicted tokens."""
        return len(self.ids) - self.first


@dataclass(frozen=True)
class Score:
    """`nll` in nats, summed over the predicted tokens; `greedy`: each was the likeliest."""

    nll: float
    greedy: bool


@dataclass(frozen=True)
class Call:
    """Rows that one forward call runs."""

    rows: tuple[int, ...]
    """Numbers of rows."""
    scored: tuple[bool, ...]
    """False where a row only keeps the others company; it is scored elsewhere."""


def calls(
    rows: Sequence[Row],
    questions: Sequence[int],
    decode_batch: int = 1,
    seed: int = 0,
    batch_tokens: int = BATCH_TOKENS,
) -> tuple[Call, ...]:
    """All rows, those of similar lengths together, longest first; `questions` are theirs.

    Every `decode_batch` neighbours of a call decode together: rows of different questions, by lot.
    The last few are filled up with rows that are scored elsewhere. Raises LeanMoeError when there
    are fewer rows than decode together.
    """
    if len(rows) < decode_batch:
        raise LeanMoeError(
            f"decode_batch is {decode_batch}: there are {len(rows)} answers to score, "
            "so fewer can decode together"
        )
    draw = random.Random(seed)
    ranks = {question: draw.random() for question in sorted(set(questions))}

    def length(row: int) -> tuple[int, int]:
        return -(rows[row].reply // LENGTH_STEP), -rows[row].prompt

    order = sorted(range(len(rows)), key=lambda row: (length(row), ranks[questions[row]], row))
    if decode_batch > 1:
        order = _dealt(order, [ranks[question] for question in questions], decode_batch)
    missing = -len(order) % decode_batch
    company = draw.sample(order[: len(order) - (decode_batch - missing)], missing)
    scored = [True] * len(order) + [False] * missing
    order += company
    return tuple(
        Call(tuple(order[start:end]), tuple(scored[start:end]))
        for start, end in _cuts(rows, order, decode_batch, batch_tokens)
    )


def _dealt(order: Sequence[int], ranks: Sequence[float], together: int) -> list[int]:
    """The order within stretches changed so that neighbours are of different questions."""
    dealt: list[int] = []
    for start in range(0, len(order), STEPS_APART * together):
        stretch = sorted(order[start : start + STEPS_APART * together], key=lambda row: ranks[row])
        steps = max(1, len(stretch) // together)
        dealt += [row for step in range(steps) for row in stretch[step::steps]]
    return dealt


def _cuts(
    rows: Sequence[Row], order: Sequence[int], together: int, batch_tokens: int
) -> Iterator[tuple[int, int]]:
    """Starts and ends of calls: whole steps, as many as fit in `batch_tokens`."""
    start = width_prompt = width_reply = 0
    for step in range(0, len(order), together):
        chosen = [rows[row] for row in order[step : step + together]]
        prompt = max(width_prompt, *(row.prompt for row in chosen), 0)
        reply = max(width_reply, *(row.reply for row in chosen), 0)
        if step > start and (prompt + reply) * (step + together - start) > batch_tokens:
            yield start, step
            start = step
            prompt = max(row.prompt for row in chosen)
            reply = max(row.reply for row in chosen)
        width_prompt, width_reply = prompt, reply
    yield start, len(order)


@dataclass(frozen=True)
class Laid:
    """The tensors of a call: padding on the left of prompts and on the right of replies."""

    ids_NL: Tensor
    following_NL: Tensor
    mask_NL: Tensor
    read_NL: Tensor
    """True where the prediction of the next token counts."""
    prompt_tokens: int

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Laid:
        """Rows in the order given."""
        prompt, reply = max(r.prompt for r in rows), max(r.reply for r in rows)
        ids_NL = torch.full((len(rows), prompt + reply), rows[0].ids[0])
        following_NL, mask_NL = ids_NL.clone(), torch.zeros_like(ids_NL, dtype=torch.bool)
        for number, row in enumerate(rows):
            here = slice(prompt - row.prompt, prompt + row.reply)
            ids = torch.tensor(row.ids)
            ids_NL[number, here], following_NL[number, here] = ids[:-1], ids[1:]
            mask_NL[number, here] = True
        read_NL = mask_NL & (torch.arange(prompt + reply) >= prompt)
        return cls(ids_NL, following_NL, mask_NL, read_NL, prompt)

    def run(self, model: Any) -> Tensor:
        """The hidden states [N,L,D] that the model's head would read."""
        device = model.device
        settings: dict[str, Any] = {}
        if not bool(self.mask_NL.all()):
            positions_NL = (self.mask_NL.cumsum(1) - 1).clamp(min=0)
            settings["attention_mask"] = self.mask_NL.long().to(device)
            settings["position_ids"] = positions_NL.to(device)
        done = model.base_model(input_ids=self.ids_NL.to(device), use_cache=False, **settings)
        hidden_NLD: Tensor = done[0]
        return hidden_NLD


@torch.inference_mode()
def score_rows(
    model: Any,
    rows: Sequence[Row],
    questions: Sequence[int],
    applying: Applying,
    what: str,
    decode_batch: int = 1,
    seed: int = 0,
    batch_tokens: int = BATCH_TOKENS,
    seen: Callable[[Tensor], None] | None = None,
) -> list[Score]:
    """One Score per row, in the order given; see `calls` for what decodes together.

    `applying` gets a call's prompt tokens and sets the model up for it; `seen` is told which of
    the coming call's tokens are no padding. Raises LeanMoeError, naming the row, for a row that
    is too short or longer than the model reads, or whose logits are not finite numbers.
    """
    _require_lengths(model, rows)
    head = Head.of(model)
    scores: list[Score | None] = [None] * len(rows)
    with bar(what, sum(len(row.ids) for row in rows), "tokens") as advance:
        for call in calls(rows, questions, decode_batch, seed, batch_tokens):
            laid = Laid.of([rows[row] for row in call.rows])
            if seen is not None:
                seen(laid.mask_NL.flatten())
            with applying(laid.prompt_tokens):
                hidden_NLD = laid.run(model)
            found = _scores(head, laid, hidden_NLD, call.rows)
            for row, is_scored, score in zip(call.rows, call.scored, found, strict=True):
                if is_scored:
                    scores[row] = score
                    advance(len(rows[row].ids))
    return [score for score in scores if score is not None]


def _scores(head: Head, laid: Laid, hidden_NLD: Tensor, numbers: Sequence[int]) -> Iterator[Score]:
    read_NL = laid.read_NL.to(hidden_NLD.device)
    hidden_TD = hidden_NLD[read_NL]
    following_T = laid.following_NL.to(hidden_NLD.device)[read_NL]
    log_normaliser_T, likeliest_T = head.log_normaliser_and_likeliest(hidden_TD)
    rows_T = laid.read_NL.nonzero()[:, 0]
    bad = (~log_normaliser_T.isfinite()).nonzero().flatten()
    if len(bad):
        row = numbers[int(rows_T[int(bad[0])])]
        raise LeanMoeError(
            f"the model's logits are not finite numbers in answer {row}: check the weights, the "
            "number type and the plan"
        )
    nll_T = (log_normaliser_T.double() - head.logits_at(hidden_TD, following_T)).cpu()
    hit_T = (likeliest_T == following_T).cpu()
    sums_N = torch.zeros(len(numbers), dtype=torch.float64).index_add_(0, rows_T, nll_T)
    missed_N = torch.zeros(len(numbers)).index_add_(0, rows_T, (~hit_T).float())
    for nll, missed in zip(sums_N.tolist(), missed_N.tolist(), strict=True):
        yield Score(nll, missed == 0)


def _require_lengths(model: Any, rows: Sequence[Row]) -> None:
    most = getattr(model.config, "max_position_embeddings", None)
    for number, row in enumerate(rows):
        if row.first < 1 or row.reply < 1:
            raise LeanMoeError(f"answer {number} has no token to predict after its first")
        if most is not None and len(row.ids) - 1 > most:
            raise LeanMoeError(
                f"answer {number} has {len(row.ids)} tokens; the model reads at most {most + 1}"
            )
