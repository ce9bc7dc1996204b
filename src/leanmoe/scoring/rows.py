"""Log-likelihoods of continuations, run as a service would have run them.

A row is a prompt and the tokens that are predicted after it. The answers of a question share its
tokens as far as they are the same, and branch: they run as one bundle, in which a mask lets each
answer see the shared tokens and its own. In a call, bundles are set so that their predictions
start in the same column: what is before it is a prompt, which `apply` runs under the rules for
prompts; what is after decodes, and each column of `decode_batch` neighbours is a step. Neighbours
are different questions, drawn by a seed: which other requests a token meets is chance in a service
too.

Letters: S bundles of a call, N its columns, T predictions, D hidden width.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from leanmoe.core.errors import LeanMoeError
from leanmoe.core.progress import bar
from leanmoe.plan import Plan
from leanmoe.runtime import apply, partial_attention_reason, served_experts
from leanmoe.scoring.divergence import Head

BATCH_TOKENS = 8192
"""Columns times bundles of one forward call, unless a decode batch needs more."""
LENGTH_STEP = 4
"""Bundles whose decoded tokens differ by less count as equally long when they are sorted."""
PADDING, TRUNK = -1, 0
"""What a column is when it is of no answer; answers are numbered from 1."""


@dataclass(frozen=True)
class ScoringSetup:
    """A model set up as a service runs it, with so many requests in a decode batch."""

    model: Any
    applying: Callable[[int], AbstractContextManager[Any]]
    """What sets the model up for calls with so many prompt tokens."""
    decode_batch: int = 1
    seed: int = 0
    """Draws which requests share a step."""

    @classmethod
    def of(cls, model: Any, plan: Plan, decode_batch: int, seed: int) -> ScoringSetup:
        """The model under a plan, its experts run by what measurements use."""

        def applying(prompt_tokens: int) -> AbstractContextManager[Any]:
            return apply(
                model,
                plan,
                experts=served_experts(model),
                decode_batch=decode_batch,
                prompt_tokens=prompt_tokens,
            )

        return cls(model, applying, decode_batch, seed)


@dataclass(frozen=True)
class ScoredRow:
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
class Bundle:
    """Rows that run their first `trunk` tokens once."""

    numbers: tuple[int, ...]
    rows: tuple[ScoredRow, ...]
    trunk: int

    @property
    def prompt(self) -> int:
        """Tokens whose prediction nobody reads."""
        return self.rows[0].prompt

    @property
    def decoded(self) -> int:
        """Columns after the prompt: the rest of the trunk, then each row's own."""
        return self.trunk - self.prompt + sum(len(row.ids) - 1 - self.trunk for row in self.rows)


@dataclass(frozen=True)
class Call:
    """Bundles that one forward call runs."""

    bundles: tuple[Bundle, ...]
    scored: tuple[bool, ...]
    """False where a bundle only fills a decode batch up; it is scored elsewhere."""


def bundled(
    rows: Sequence[ScoredRow], questions: Sequence[int], can_branch: bool = True
) -> tuple[Bundle, ...]:
    """A bundle for each question and prompt; `questions` holds each row's question."""
    groups: dict[object, list[int]] = {}
    for number, (row, question) in enumerate(zip(rows, questions, strict=True)):
        key = (question, row.ids[: row.prompt]) if can_branch else number
        groups.setdefault(key, []).append(number)
    return tuple(
        Bundle(tuple(numbers), chosen, _shared(chosen))
        for numbers, chosen in ((n, tuple(rows[k] for k in n)) for n in groups.values())
    )


def _shared(rows: Sequence[ScoredRow]) -> int:
    """First tokens that all rows have in common, of those whose own next token is predicted."""
    if len(rows) == 1:
        return len(rows[0].ids) - 1
    for place, ids in enumerate(zip(*(row.ids[:-1] for row in rows), strict=False)):
        if len(set(ids)) > 1:
            return place
    return min(len(row.ids) for row in rows) - 1


def calls(
    bundles: Sequence[Bundle],
    decode_batch: int = 1,
    seed: int = 0,
    batch_tokens: int = BATCH_TOKENS,
) -> tuple[Call, ...]:
    """All bundles in calls: neighbours are of similar lengths, the longest first.

    Every `decode_batch` neighbours of a call are a step: which ones, among similar lengths, is
    drawn. The last step is filled up with bundles that are scored elsewhere. Raises LeanMoeError
    when there are fewer bundles than that.
    """
    if len(bundles) < decode_batch:
        raise LeanMoeError(
            f"decode_batch is {decode_batch}: there are "
            f"{len(bundles)} questions, and it needs as many"
        )
    draw = random.Random(seed)
    ranks = [draw.random() for _ in bundles]

    def key(number: int) -> tuple[int, int, float]:
        bundle = bundles[number]
        return -(bundle.decoded // LENGTH_STEP), -(bundle.prompt // LENGTH_STEP), ranks[number]

    order = sorted(range(len(bundles)), key=key)
    missing = -len(order) % decode_batch
    scope = draw.sample(order[: len(order) - (decode_batch - missing)], missing)
    scored = [True] * len(order) + [False] * missing
    chosen = [bundles[number] for number in order + scope]
    return tuple(
        Call(tuple(chosen[start:end]), tuple(scored[start:end]))
        for start, end in _cuts(chosen, decode_batch, batch_tokens)
    )


def _cuts(
    bundles: Sequence[Bundle], decode_batch: int, batch_tokens: int
) -> Iterator[tuple[int, int]]:
    """Starts and ends of calls: whole steps, as many as fit in `batch_tokens`."""
    start = prompt = decoded = 0
    for step in range(0, len(bundles), decode_batch):
        chosen = bundles[step : step + decode_batch]
        widest = max(b.prompt for b in chosen), max(b.decoded for b in chosen)
        wider = max(prompt, widest[0]), max(decoded, widest[1])
        if step > start and sum(wider) * (step + decode_batch - start) > batch_tokens:
            yield start, step
            start, wider = step, widest
        prompt, decoded = wider
    yield start, len(bundles)


@dataclass(frozen=True)
class Laid:
    """The tensors of a call: padding on the left of prompts and on the right of what decodes."""

    ids_SN: Tensor
    positions_SN: Tensor
    answer_SN: Tensor
    """PADDING, TRUNK, or the answer of the bundle that a column is of."""
    prompt_tokens: int
    place_T: Tensor
    """The bundle and column of each prediction as one number."""
    following_T: Tensor
    """The token that is predicted."""
    row_T: Tensor
    """The row it belongs to, counted over the call's bundles."""

    @classmethod
    def of(cls, bundles: Sequence[Bundle]) -> Laid:
        """Bundles in the order given."""
        prompt, decoded = max(b.prompt for b in bundles), max(b.decoded for b in bundles)
        shape = (len(bundles), prompt + decoded)
        ids_SN = torch.full(shape, bundles[0].rows[0].ids[0])
        positions_SN = torch.zeros(shape, dtype=torch.int64)
        answer_SN = torch.full(shape, PADDING)
        places: list[Tensor] = []
        following: list[int] = []
        owners: list[int] = []
        rows = 0
        for number, bundle in enumerate(bundles):
            start = prompt - bundle.prompt
            trunk = slice(start, start + bundle.trunk)
            ids_SN[number, trunk] = torch.tensor(bundle.rows[0].ids[: bundle.trunk])
            positions_SN[number, trunk] = torch.arange(bundle.trunk)
            answer_SN[number, trunk] = TRUNK
            shared = torch.arange(prompt, trunk.stop)
            at = trunk.stop
            for answer, row in enumerate(bundle.rows, start=1):
                own = slice(at, at + len(row.ids) - 1 - bundle.trunk)
                ids_SN[number, own] = torch.tensor(row.ids[bundle.trunk : -1])
                positions_SN[number, own] = torch.arange(bundle.trunk, len(row.ids) - 1)
                answer_SN[number, own] = answer
                columns = torch.cat([shared, torch.arange(own.start, own.stop)])
                places.append(number * shape[1] + columns)
                following += row.ids[row.first :]
                owners += [rows] * row.reply
                rows, at = rows + 1, own.stop
        return cls(
            ids_SN,
            positions_SN,
            answer_SN,
            prompt,
            torch.cat(places),
            torch.tensor(following),
            torch.tensor(owners),
        )

    def run(self, model: Any) -> Tensor:
        """The hidden states [S,N,D] that the model's head would read."""
        device = model.device
        settings: dict[str, Any] = {}
        if bool((self.answer_SN != TRUNK).any()):
            settings["attention_mask"] = self._mask(model.dtype).to(device)
            settings["position_ids"] = self.positions_SN.to(device)
        done = model.base_model(input_ids=self.ids_SN.to(device), use_cache=False, **settings)
        hidden_SND: Tensor = done[0]
        return hidden_SND

    def _mask(self, dtype: torch.dtype) -> Tensor:
        """Padding as [S,N] where no bundle branches; else [S,1,N,N], to be added to scores."""
        answer_SN = self.answer_SN
        if not bool((answer_SN > TRUNK).any()):
            return (answer_SN != PADDING).long()
        length = answer_SN.shape[1]
        before_NN = torch.ones(length, length, dtype=torch.bool).tril()
        same_SNN = answer_SN[:, :, None] == answer_SN[:, None, :]
        sees_SNN = before_NN & (same_SNN | (answer_SN == TRUNK)[:, None, :])
        sees_SNN &= (answer_SN != PADDING)[:, None, :]
        mask_SNN = torch.zeros(sees_SNN.shape, dtype=dtype)
        return mask_SNN.masked_fill(~sees_SNN, torch.finfo(dtype).min)[:, None]


@torch.inference_mode()
def score_rows(
    setup: ScoringSetup,
    rows: Sequence[ScoredRow],
    questions: Sequence[int],
    what: str,
    batch_tokens: int = BATCH_TOKENS,
    seen: Callable[[Tensor], None] | None = None,
) -> list[Score]:
    """One Score per row, in the order given; `questions` says which rows answer the same one.

    `seen` is told which of the coming call's tokens [T] are no padding. Raises LeanMoeError, naming
    the row, for a row that is too short or longer than the model reads, or whose logits are not
    finite numbers.
    """
    model = setup.model
    _require_lengths(model, rows)
    head = Head.of(model)
    scores: list[Score | None] = [None] * len(rows)
    bundles = bundled(rows, questions, partial_attention_reason(model.config) is None)
    with bar(what, sum(len(row.ids) for row in rows), "tokens") as advance:
        for call in calls(bundles, setup.decode_batch, setup.seed, batch_tokens):
            laid = Laid.of(call.bundles)
            if seen is not None:
                seen((laid.answer_SN != PADDING).flatten())
            with setup.applying(laid.prompt_tokens):
                hidden_SND = laid.run(model)
            numbers = [number for bundle in call.bundles for number in bundle.numbers]
            found = _scores(head, laid, hidden_SND, numbers)
            for bundle, is_scored in zip(call.bundles, call.scored, strict=True):
                for number in bundle.numbers:
                    score = next(found)
                    if is_scored:
                        scores[number] = score
                        advance(len(rows[number].ids))
    return [score for score in scores if score is not None]


def _scores(head: Head, laid: Laid, hidden_SND: Tensor, numbers: Sequence[int]) -> Iterator[Score]:
    """A Score for each of the call's rows, whose numbers are given."""
    device = hidden_SND.device
    flat_TD = hidden_SND.flatten(0, 1)
    # A place that several answers share is read once.
    places, which_T = torch.unique(laid.place_T, return_inverse=True)
    read = flat_TD[places.to(device)]
    log_normaliser, likeliest = head.log_normaliser_and_likeliest(read)
    following_T, which_T = laid.following_T.to(device), which_T.to(device)
    bad = (~log_normaliser[which_T].isfinite()).nonzero().flatten()
    if len(bad):
        raise LeanMoeError(
            "the model's logits are not finite numbers in answer "
            f"{numbers[int(laid.row_T[int(bad[0])])]}: check the weights, the number type and the "
            "plan"
        )
    logit_T = head.logits_at(read[which_T], following_T)
    nll_T = (log_normaliser[which_T].double() - logit_T).cpu()
    missed_T = (likeliest[which_T] != following_T).cpu()
    sums = torch.zeros(len(numbers), dtype=torch.float64).index_add_(0, laid.row_T, nll_T)
    missed = torch.zeros(len(numbers)).index_add_(0, laid.row_T, missed_T.float())
    for nll, misses in zip(sums.tolist(), missed.tolist(), strict=True):
        yield Score(nll, misses == 0)


def _require_lengths(model: Any, rows: Sequence[ScoredRow]) -> None:
    most = getattr(model.config, "max_position_embeddings", None)
    for number, row in enumerate(rows):
        if row.first < 1 or row.reply < 1:
            raise LeanMoeError(f"answer {number} has no token to predict after its first")
        if most is not None and len(row.ids) - 1 > most:
            raise LeanMoeError(
                f"answer {number} has {len(row.ids)} tokens; the model reads at most {most + 1}"
            )
