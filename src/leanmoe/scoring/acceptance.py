"""How often a full model would accept what a cheaper one proposes (ESAP, arXiv 2603.06003).

Speculative decoding accepts a draft's token with probability Σ_v min(p_v, q_v), which is one less
the total variation between the two next-token distributions: between 0 and 1, and cheap, since
both only read the same text.

Letters: T tokens, D hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from leanmoe.core.errors import LeanMoeError
from leanmoe.scoring.divergence import Head, final_hidden
from leanmoe.scoring.windows import WindowBatch, Windows


class Acceptance:
    """What the full model predicts on some windows, to hold others against.

    Nothing may be applied to the model when it is made.
    """

    def __init__(self, model: Any, windows: Windows) -> None:
        self._head = Head.of(model)
        self._batches: Sequence[WindowBatch] = windows.batches()
        self._full = [self._predicted(model, batch) for batch in self._batches]

    @torch.inference_mode()
    def of(self, model: Any) -> float:
        """The mean over tokens, under whatever is applied to the model now.

        Raises LeanMoeError when a logit is not a finite number.
        """
        total, tokens = 0.0, 0
        for batch, full_TD in zip(self._batches, self._full, strict=True):
            shared_T = self._head.shared_mass(full_TD, self._predicted(model, batch))
            if not bool(shared_T.isfinite().all()):
                raise LeanMoeError("the model's logits are not finite numbers: check the plan")
            total += float(shared_T.double().sum())
            tokens += len(shared_T)
        return total / tokens

    @torch.inference_mode()
    def _predicted(self, model: Any, batch: WindowBatch) -> Tensor:
        hidden_SND = final_hidden(model, batch)
        found: Tensor = hidden_SND[:, :-1][batch.predicted.to(hidden_SND.device)]
        return found
