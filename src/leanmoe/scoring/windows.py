"""Documents cut into windows of tokens, and batches of windows for a model to run.

Letters: S windows, N tokens of a window, D hidden width.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from leanmoe.core.errors import LeanMoeError
from leanmoe.core.text import Document

WINDOW_TOKENS = 256
MINIMUM_WINDOW_TOKENS = 16
"""Shorter pieces are left out: nearly all of their tokens would be predicted without context."""
BATCH_TOKENS = 4096
"""Tokens in one forward call, unless a decode batch needs more."""


@dataclass(frozen=True)
class WindowBatch:
    """Windows of one forward call, padded on the right to the longest of them."""

    ids_SN: Tensor
    mask_SN: Tensor
    """True where there is a token."""
    rows_S: Tensor
    """Each row's number in its `Windows`."""
    scored_S: Tensor
    """False for a window that only fills a decode batch up; it is scored in another batch."""
    prompt_tokens: int = 0
    reply_tokens: int = 0
    """Where above 0, the tokens after the prompt are replies of so many tokens; see `replies`."""

    @property
    def prompt_in_call(self) -> int:
        """The first tokens of a row in the model's call that are a prompt: what `apply` takes."""
        return self.ids_SN.shape[1] if self.reply_tokens else self.prompt_tokens

    @property
    def attention_mask(self) -> Tensor | None:
        """What the model's forward takes: None when there is no padding."""
        return None if bool(self.mask_SN.all()) else self.mask_SN.long()

    @property
    def predicted(self) -> Tensor:
        """True [S,N-1] at positions whose next token exists and whose prediction counts."""
        read_N = torch.arange(self.ids_SN.shape[1] - 1) >= self.prompt_tokens
        return self.mask_SN[:, 1:] & self.scored_S[:, None] & read_N

    @property
    def tokens(self) -> int:
        """Tokens that count."""
        return int(self.mask_SN[self.scored_S].sum())


@dataclass(frozen=True)
class Windows:
    """Pieces of documents, padded on the right; no token of a document is in two of them."""

    ids_SN: Tensor
    lengths_S: Tensor
    documents_S: Tensor
    """The number of the document in `names` that a window is from."""
    names: tuple[str, ...]
    seed: int = 0
    prompt_tokens: int = 0
    """The first tokens of each window whose next-token prediction nobody reads: not scored."""
    reply_tokens: int = 0
    """Where above 0, what follows are replies of so many tokens to ever longer prompts."""
    sources: tuple[str, ...] = ()
    """What each document is from; without, each is a source of its own."""

    @classmethod
    def of_ids(cls, ids_SN: Tensor, names: Sequence[str] | None = None) -> Windows:
        """Full windows, each a document of its own."""
        rows, length = ids_SN.shape
        named = tuple(names) if names else tuple(f"sequence {n}" for n in range(rows))
        return cls(ids_SN, torch.full((rows,), length), torch.arange(rows), named)

    @property
    def tokens(self) -> int:
        """Tokens in all windows, padding not counted."""
        return int(self.lengths_S.sum())

    @property
    def documents(self) -> int:
        """Documents the windows are from."""
        return len(self.names)

    @property
    def units(self) -> int:
        """Sources the documents are from."""
        return len(set(self.sources or self.names))

    @classmethod
    def joined(cls, parts: Sequence[Windows]) -> Windows:
        """The windows of several texts as those of one; all must be of one length."""
        sources = [name for part in parts for name in part.sources or part.names]
        starts = accumulate((part.documents for part in parts), initial=0)
        numbers = [part.documents_S + start for part, start in zip(parts, starts, strict=False)]
        return replace(
            parts[0],
            ids_SN=torch.cat([part.ids_SN for part in parts]),
            lengths_S=torch.cat([part.lengths_S for part in parts]),
            documents_S=torch.cat(numbers),
            names=tuple(name for part in parts for name in part.names),
            sources=tuple(sources),
        )

    @property
    def mask(self) -> Tensor:
        """True [S,N] where there is a token."""
        return torch.arange(self.ids_SN.shape[1]) < self.lengths_S[:, None]

    @property
    def prompt_in_call(self) -> int:
        """The first tokens of a row in the model's call that are a prompt: what `apply` takes."""
        return self.ids_SN.shape[1] if self.reply_tokens else self.prompt_tokens

    def after_prompt(self, tokens: int, reply: int = 0) -> Windows:
        """The same windows with their first `tokens` tokens as a prompt, which is not scored.

        With `reply`, the rest is cut into replies of so many tokens, each to the prompt of all
        tokens before it; windows must be full then.
        """
        if not 0 <= tokens < self.ids_SN.shape[1] - 1:
            raise LeanMoeError(
                f"prompt is {tokens} tokens: it must be 0 to {self.ids_SN.shape[1] - 2}, so that "
                f"windows of {self.ids_SN.shape[1]} have a token to predict after it"
            )
        if reply and not bool((self.lengths_S == self.ids_SN.shape[1]).all()):
            raise LeanMoeError("windows with replies must all be full: one of them is padded")
        return replace(self, prompt_tokens=tokens, reply_tokens=reply)

    def batches(
        self, batch_tokens: int = BATCH_TOKENS, decode_batch: int | None = None
    ) -> tuple[WindowBatch, ...]:
        """All windows, longest first and those of a document spread out, in batches.

        With `decode_batch`, every batch holds a multiple of that many windows. Neighbours in such
        a step come from different documents as far as there are enough. The last step is filled up
        with windows of others, which are not scored again.

        Raises LeanMoeError when there are fewer windows than a decode batch has.
        """
        step = decode_batch or 1
        count = len(self.lengths_S)
        if count < step:
            raise LeanMoeError(
                f"decode_batch is {step}: the text gives {count} windows, so a decode batch has "
                f"at most {count} sequences; give more text or shorter windows"
            )
        order = self._spread()
        missing = -count % step
        scope = random.Random(self.seed).sample(order[: count - (step - missing)], missing)
        rows = torch.tensor(order + scope)
        scored = torch.arange(len(rows)) < count
        size = step * max(1, batch_tokens // (step * self.ids_SN.shape[1]))
        return tuple(
            self._batch(rows[start : start + size], scored[start : start + size])
            for start in range(0, len(rows), size)
        )

    def _spread(self) -> list[int]:
        """Window numbers by falling length; each document's evenly spread among equal lengths."""
        draw = random.Random(self.seed)
        offsets = [draw.random() for _ in self.names]
        documents = self.documents_S.tolist()
        counts = torch.bincount(self.documents_S, minlength=len(self.names)).tolist()
        seen = [0] * len(self.names)
        keys: list[tuple[int, float]] = []
        for document, length in zip(documents, self.lengths_S.tolist(), strict=True):
            place = (seen[document] + offsets[document]) / counts[document]
            keys.append((-length, place))
            seen[document] += 1
        return sorted(range(len(keys)), key=keys.__getitem__)

    def _batch(self, rows_S: Tensor, scored_S: Tensor) -> WindowBatch:
        longest = int(self.lengths_S[rows_S].max())
        return WindowBatch(
            self.ids_SN[rows_S, :longest],
            self.mask[rows_S, :longest],
            rows_S,
            scored_S,
            self.prompt_tokens,
            self.reply_tokens,
        )


def cut(
    documents: Sequence[Document],
    tokenizer: Any,
    length: int = WINDOW_TOKENS,
    tokens: int | None = None,
    seed: int = 0,
) -> Windows:
    """Windows of at most `length` tokens from `documents`, about `tokens` in all (None: all).

    As many documents as possible share the tokens, since statistics are paired by document: one
    window of each, in shuffled order, then a second of each, until there are enough. A document's
    windows are taken in shuffled order too. Each document starts with the tokenizer's
    beginning-of-text token, if it has one. `seed` decides every shuffle.

    Raises LeanMoeError when no document is long enough.
    """
    if length < MINIMUM_WINDOW_TOKENS:
        raise LeanMoeError(
            f"window length is {length} tokens: it must be at least {MINIMUM_WINDOW_TOKENS}"
        )
    draw = random.Random(seed)
    shuffled = list(documents)
    draw.shuffle(shuffled)
    pieces, available = {}, 0
    for number, document in enumerate(shuffled):
        if tokens is not None and available >= tokens:
            break
        windows = list(_pieces(_token_ids(document, tokenizer), length))
        draw.shuffle(windows)
        if windows:
            pieces[number] = windows
            available += len(windows[0])
    if not pieces:
        raise LeanMoeError(
            f"the text is too short: none of its {len(documents)} documents has "
            f"{MINIMUM_WINDOW_TOKENS} tokens"
        )
    chosen = list(_in_rounds(pieces, tokens))
    used = sorted({number for number, _ in chosen})
    renumbered = {number: n for n, number in enumerate(used)}
    ids_SN = torch.zeros((len(chosen), length), dtype=torch.int64)
    for row, (_, piece) in enumerate(chosen):
        ids_SN[row, : len(piece)] = torch.tensor(piece)
    return Windows(
        ids_SN,
        torch.tensor([len(piece) for _, piece in chosen]),
        torch.tensor([renumbered[number] for number, _ in chosen]),
        tuple(shuffled[number].name for number in used),
        seed,
        sources=tuple(shuffled[number].unit for number in used),
    )


def _token_ids(document: Document, tokenizer: Any) -> list[int]:
    ids: list[int] = tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"]
    start = tokenizer.bos_token_id
    return ids if start is None or ids[:1] == [start] else [start, *ids]


def _pieces(ids: list[int], length: int) -> Iterator[list[int]]:
    for start in range(0, len(ids), length):
        piece = ids[start : start + length]
        if len(piece) >= MINIMUM_WINDOW_TOKENS:
            yield piece


def _in_rounds(
    pieces: dict[int, list[list[int]]], tokens: int | None
) -> Iterable[tuple[int, list[int]]]:
    """One piece of each document, then another of each, until there are `tokens`."""
    taken = 0
    for number_of_piece in range(max(map(len, pieces.values()))):
        for number, found in pieces.items():
            if tokens is not None and taken >= tokens:
                return
            if number_of_piece < len(found):
                taken += len(found[number_of_piece])
                yield number, found[number_of_piece]


def branched_ids(ids_SN: Tensor, prompt: int) -> Tensor:
    """The rows of the call [S,N]: the window, then its tokens after the first `prompt` again."""
    return torch.cat([ids_SN, ids_SN[:, prompt:]], dim=1)


@lru_cache(maxsize=16)
def branched_layout(
    length: int, prompt: int, reply: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Position ids [1,N] and the attention mask [1,1,N,N], to be added to scores, of such rows.

    N is `length` + `length` − `prompt`. Reply number n holds window positions prompt + n x reply
    to prompt + (n+1) x reply - 1. Its first token is the last one of its prompt: the one whose
    prediction is the reply's first token.
    """
    window = torch.arange(length)
    replies = window[prompt:]
    starts = prompt + (replies - prompt) // reply * reply
    window_sees_window = window[:, None] >= window[None, :]
    reply_sees_window = starts[:, None] > window[None, :]
    is_same_reply = starts[:, None] == starts[None, :]
    reply_sees_reply = is_same_reply & (replies[:, None] >= replies[None, :])
    nothing = torch.zeros(length, length - prompt).bool()
    upper = torch.cat([window_sees_window, nothing], dim=1)
    lower = torch.cat([reply_sees_window, reply_sees_reply], dim=1)
    sees_NN = torch.cat([upper, lower])
    mask_NN = torch.zeros(sees_NN.shape, dtype=dtype).masked_fill(~sees_NN, torch.finfo(dtype).min)
    return torch.cat([window, replies])[None], mask_NN[None, None]


def unbranched(hidden_SND: Tensor, length: int, prompt: int) -> Tensor:
    """The windows' final hidden states [S,N,D], those of the replies in their places."""
    return torch.cat([hidden_SND[:, :prompt], hidden_SND[:, length:]], dim=1)
