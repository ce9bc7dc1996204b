"""Log-likelihoods of token sequences under the model, at any uniform k, and expert use.

Shape suffixes: see architecture.py; P is predicted positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from leanmoe.core.errors import LeanMoeError
from leanmoe.scoring.rows import Score, ScoredRow, ScoringSetup, score_rows
from reference_model.architecture import routers


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

    def score(self, rows: Sequence[ScoredRow], what: str) -> list[Score]:
        """One Score per row, in the given order; rows of similar length share a batch."""

        def note(real_T: Tensor) -> None:
            self._real_T = real_T.to(self.device)

        def as_it_is(_prompt_tokens: int) -> AbstractContextManager[None]:
            return nullcontext()

        return score_rows(
            ScoringSetup(self.model, as_it_is), rows, range(len(rows)), what, seen=note
        )

    @contextmanager
    def counting_experts(self) -> Iterator[Tensor]:
        """Yields an (L,E) count of slots per MoE layer and expert, filled while inside.

        Padding is not counted.
        """
        gates = routers(self.model)
        experts = int(cast(Tensor, gates[0].weight).shape[0])
        counts_LE = torch.zeros(len(gates), experts, dtype=torch.long)

        def counter(layer: int) -> Any:
            def count(_gate: Any, _inputs: Any, outputs: tuple[Tensor, Tensor, Tensor]) -> None:
                ids_X = outputs[2][self._real_T].flatten().cpu()
                counts_LE[layer] += torch.bincount(ids_X, minlength=experts)

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
