"""Log-likelihoods of token sequences under the model, at any uniform k, and expert use.

Shape suffixes: see architecture.py; P is predicted positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from leanmoe.errors import LeanMoeError
from leanmoe.progress import bar
from leanmoe.reference.architecture import routers

BATCH_TOKENS = 8192
"""Padded tokens per forward pass."""


@dataclass(frozen=True)
class Row:
    """A sequence of which `ids[first:]` is predicted, each token from all before it."""

    ids: tuple[int, ...]
    first: int = 1


@dataclass(frozen=True)
class Score:
    """`nll` in nats, summed over the predicted tokens; `greedy`: each was the likeliest."""

    nll: float
    greedy: bool


class Scorer:
    """The model and tokenizer of a folder, ready to score; bf16, as trained."""

    def __init__(self, folder: Path, device: str) -> None:
        self.folder, self.device = folder, torch.device(device)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16
        ).to(self.device)
        self.model.eval()
        self.trained_k = int(self.model.config.num_experts_per_tok)
        self.context = int(self.model.config.max_position_embeddings)
        self.start_id = int(self.tokenizer.bos_token_id)
        self.bytes_per_id = bytes_per_id(self.tokenizer)
        self._real_T = torch.empty(0, dtype=torch.bool)
        """Which tokens of the batch at hand are not padding."""

    def encode(self, text: str) -> list[int]:
        """Token ids, with nothing added in front."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False, verbose=False)
        return ids

    @contextmanager
    def uniform_k(self, k: int) -> Iterator[None]:
        """Every token uses its best k experts in every layer; undone on exit."""
        if not 1 <= k <= self.trained_k:
            raise LeanMoeError(f"k is {k}; allowed are 1 to {self.trained_k}")
        try:
            self._set_k(k)
            yield
        finally:
            self._set_k(self.trained_k)

    def _set_k(self, k: int) -> None:
        self.model.config.num_experts_per_tok = k
        for gate in routers(self.model):
            setattr(gate, "top_k", k)  # noqa: B010

    def score(self, rows: Sequence[Row], what: str) -> list[Score]:
        """One Score per row, in the given order; rows of similar length share a batch."""
        scores: list[Score | None] = [None] * len(rows)
        with bar(what, sum(len(row.ids) for row in rows), "tokens") as advance:
            for batch in batches([len(row.ids) for row in rows], BATCH_TOKENS):
                chosen = [rows[index] for index in batch]
                for index, score in zip(batch, self._score_batch(chosen), strict=True):
                    scores[index] = score
                advance(sum(len(row.ids) for row in chosen))
        return [score for score in scores if score is not None]

    @torch.inference_mode()
    def _score_batch(self, rows: Sequence[Row]) -> list[Score]:
        longest = max(len(row.ids) for row in rows)
        if longest - 1 > self.context:
            raise LeanMoeError(
                f"a sequence of {longest} tokens; the model reads at most {self.context + 1}"
            )
        # Padding on the right: under a causal mask nothing before it can see it.
        ids_ST = torch.full((len(rows), longest), self.start_id)
        for row, ids_T in zip(rows, ids_ST, strict=True):
            ids_T[: len(row.ids)] = torch.tensor(row.ids)
        ids_ST = ids_ST.to(self.device)
        lengths_S = torch.tensor([len(row.ids) - 1 for row in rows])
        self._real_T = (torch.arange(longest - 1) < lengths_S[:, None]).flatten().to(self.device)
        hidden_STH = self.model.model(input_ids=ids_ST[:, :-1], use_cache=False).last_hidden_state
        return [
            self._score_row(hidden_TH, ids_T, row)
            for hidden_TH, ids_T, row in zip(hidden_STH, ids_ST, rows, strict=True)
        ]

    def _score_row(self, hidden_TH: Tensor, ids_T: Tensor, row: Row) -> Score:
        hidden_PH = hidden_TH[row.first - 1 : len(row.ids) - 1]
        targets_P = ids_T[row.first : len(row.ids)]
        logits_PV = self.model.lm_head(hidden_PH).float()
        nll = float(torch.nn.functional.cross_entropy(logits_PV, targets_P, reduction="sum"))
        if not np.isfinite(nll):
            raise LeanMoeError("the model's log-likelihood is not a number")
        return Score(nll, bool((logits_PV.argmax(dim=-1) == targets_P).all()))

    @contextmanager
    def counting_experts(self) -> Iterator[Tensor]:
        """Yields an (L,E) count of slots per MoE layer and expert, filled while inside.

        Padding is not counted.
        """
        gates = routers(self.model)
        experts = int(self.model.config.n_routed_experts)
        counts_LE = torch.zeros(len(gates), experts, dtype=torch.long)

        def counter(layer: int) -> Any:
            def count(_gate: Any, _inputs: Any, outputs: tuple[Tensor, Tensor, Tensor]) -> None:
                ids_R = outputs[2][self._real_T].flatten().cpu()
                counts_LE[layer] += torch.bincount(ids_R, minlength=experts)

            return count

        handles = [g.register_forward_hook(counter(layer)) for layer, g in enumerate(gates)]
        try:
            yield counts_LE
        finally:
            for handle in handles:
                handle.remove()


def bytes_per_id(tokenizer: Any) -> np.ndarray[Any, np.dtype[np.int64]]:
    """UTF-8 bytes of each token: byte-level BPE writes one character per byte; specials are 0."""
    special = set(tokenizer.all_special_ids)
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    return np.array([0 if i in special else len(t) for i, t in enumerate(tokens)], dtype=np.int64)


def batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices grouped so that (longest x count) stays within `budget`; longest first."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    groups: list[list[int]] = []
    for index in order:
        if groups and lengths[groups[-1][0]] * (len(groups[-1]) + 1) <= budget:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups
