"""Next-token loss, and divergence from the full model, per document.

Letters: S windows, N tokens of a window, T predicted tokens, D hidden width, U documents.
Losses and divergences are sums of float64 nats. A token of a window is predicted from those before
it in the window; a window's first token is not predicted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from leanmoe.core.errors import LeanMoeError
from leanmoe.scoring.forward import Head, hidden_of
from leanmoe.scoring.windows import BATCH_TOKENS, WindowBatch, Windows
from leanmoe.stats.paired import Counts, Divergence, Floats, Losses


@dataclass(frozen=True)
class Reference:
    """What the full model predicts on some windows: D + 4 numbers a token instead of V.

    `compare` scores other final hidden states of the same windows against it; see `head`.
    """

    windows: Windows
    head: Head
    expected_SND: Tensor
    """Mean output vector under the full model's next-token distribution; float32."""
    mean_log_SN: Tensor
    """Mean log-probability under it (minus its entropy), short of the head's bias; float64."""
    loss_SN: Tensor
    """-log p of the token that follows; float64."""

    @torch.inference_mode()
    def compare(self, batch: WindowBatch, hidden_SND: Tensor) -> Divergence:
        """Scores final hidden states of `batch` under a plan: sums over the batch's documents.

        Raises LeanMoeError, naming the document, when a logit is not a finite number.
        """
        at = _Predicted(batch, self.windows, hidden_SND)
        normaliser_T = at.require_finite(self.head.log_normaliser(at.hidden_TD))
        crossed_T = self.head.crossed(self.expected_SND[at.places], at.hidden_TD)
        kl_T = self.mean_log_SN[at.places] - crossed_T + normaliser_T
        loss_T = normaliser_T - self.head.logits_at(at.hidden_TD, at.following_T)
        return Divergence(at.sums(kl_T), at.losses(loss_T), at.losses(self.loss_SN[at.places]))


@torch.inference_mode()
def reference(model: Any, windows: Windows, batch_tokens: int = BATCH_TOKENS) -> Reference:
    """One pass of the full model over `windows`, kept for `Reference.compare`.

    Takes 4 (D + 4) bytes a token. Nothing may be applied to the model at the time.
    Raises LeanMoeError, naming the document, when a logit is not a finite number.
    """
    head = Head.of(model)
    rows, length = windows.ids_SN.shape
    device = head.weight_VD.device
    expected_SND = torch.zeros((rows, length - 1, head.weight_VD.shape[1]), device=device)
    mean_log_SN = torch.zeros((rows, length - 1), dtype=torch.float64, device=device)
    loss_SN = torch.zeros_like(mean_log_SN)
    for batch, hidden_SND in hidden_of(model, windows, "Full model", batch_tokens):
        at = _Predicted(batch, windows, hidden_SND)
        log_normaliser_T, expected_TD = head.expected(at.hidden_TD)
        normaliser_T = at.require_finite(log_normaliser_T)
        expected_SND[at.places] = expected_TD
        mean_log_SN[at.places] = head.crossed(expected_TD, at.hidden_TD) - normaliser_T
        loss_SN[at.places] = normaliser_T - head.logits_at(at.hidden_TD, at.following_T)
    return Reference(windows, head, expected_SND, mean_log_SN, loss_SN)


def divergence(
    model: Any,
    against: Reference,
    what: str = "Plan",
    decode_batch: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
) -> Divergence:
    """KL(full ‖ plan) and both losses per document, under whatever is applied to the model now.

    `decode_batch` must be that of the `apply` at work; `what` names the progress bar.
    Raises LeanMoeError, naming the document, when a logit is not a finite number.
    """
    first, *others = (
        against.compare(batch, hidden_SND)
        for batch, hidden_SND in hidden_of(model, against.windows, what, batch_tokens, decode_batch)
    )
    return sum(others, start=first)


@torch.inference_mode()
def losses(
    model: Any,
    windows: Windows,
    what: str = "Next-token loss",
    decode_batch: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
) -> Losses:
    """Next-token loss per document, under whatever is applied to the model now.

    `decode_batch` must be that of the `apply` at work; `what` names the progress bar.
    Raises LeanMoeError, naming the document, when a logit is not a finite number.
    """
    head = Head.of(model)
    parts = []
    for batch, hidden_SND in hidden_of(model, windows, what, batch_tokens, decode_batch):
        at = _Predicted(batch, windows, hidden_SND)
        normaliser_T = at.require_finite(head.log_normaliser(at.hidden_TD))
        parts.append(at.losses(normaliser_T - head.logits_at(at.hidden_TD, at.following_T)))
    return sum(parts[1:], start=parts[0])


class _Predicted:
    """The positions [T] of a batch whose next token counts, and sums over their documents."""

    def __init__(self, batch: WindowBatch, windows: Windows, hidden_SND: Tensor) -> None:
        device = hidden_SND.device
        rows_T, positions_T = batch.predicted.nonzero(as_tuple=True)
        numbers_T = batch.rows_S[rows_T]
        self.names = windows.names
        self.documents_T = windows.documents_S[numbers_T]
        self.following_T = batch.ids_SN[rows_T, positions_T + 1].to(device)
        self.places = (numbers_T.to(device), positions_T.to(device))
        """Rows and positions in the windows."""
        self.hidden_TD = hidden_SND[rows_T.to(device), positions_T.to(device)]

    def require_finite(self, normaliser_T: Tensor) -> Tensor:
        """The log normalisers as float64; a token without one is a LeanMoeError."""
        bad = (~normaliser_T.isfinite()).nonzero()[:, 0]
        if len(bad):
            name = self.names[int(self.documents_T[int(bad[0])])]
            raise LeanMoeError(
                f"the model's logits are not finite numbers in document {name!r} ({len(bad)} "
                "tokens of its batch): check the weights, the number type and the plan"
            )
        return normaliser_T.double()

    def sums(self, values_T: Tensor) -> Floats:
        """[documents], float64."""
        total = torch.zeros(len(self.names), dtype=torch.float64)
        summed: Floats = total.index_add(0, self.documents_T, values_T.cpu().double()).numpy()
        return summed

    def losses(self, loss_T: Tensor) -> Losses:
        """The sums, with the tokens they are of."""
        tokens: Counts = np.bincount(self.documents_T.numpy(), minlength=len(self.names))
        return Losses(self.names, self.sums(loss_T), tokens)
