"""Next-token loss, and divergence from the full model, per document of some windows.

Scoring asks little of the V logits of a token: their log normaliser, one logit, a mean. So the
model runs below its head (`final_hidden`), and `Head` computes what is asked slice by slice.

A head is linear: logits = scale · (W h + b). So the divergence from the full model's distribution
p needs p only through its mean output vector, `expected` = Σ_v p_v W_v:

    KL(p ‖ q) = [Σ_v p_v logit_p(v) − log Z_p] − [Σ_v p_v logit_q(v) − log Z_q]
              = scale · expected · (h_p − h_q) + log Z_q − log Z_p.

D numbers a token then stand for the full model's V probabilities, and a plan is compared with it
at the price of the plan's own log Z.

A service that reads a few tokens after a long prompt is scored on just those. One pass per reply
would run hundreds of tokens to score a few. So replies branch off one prompt (`branched_ids`): a
window runs once as a prompt, and beside it its last part a second time, cut into replies. Each
token of a reply sees the prompt's tokens before the reply and the reply's own before itself. This
holds only for models whose tokens see all tokens before them (`runtime.partial_attention_reason`).

Losses and divergences are sums of float64 nats. A window's first token is not predicted.

Letters: S windows, N tokens of a window or of a row of the call, T tokens, D hidden width,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from leanmoe.core.errors import LeanMoeError
from leanmoe.core.progress import bar
from leanmoe.scoring.windows import (
    BATCH_TOKENS,
    WindowBatch,
    Windows,
    branched_ids,
    branched_layout,
    unbranched,
)
from leanmoe.stats.losses import Counts, Divergence, Floats, Losses

SLICE_BYTES = 32 * 1024**2
"""Bytes of float32 logits that are held at once."""
PROBES = 4
"""Random hidden states on which a head is checked."""
ROUNDING = {torch.float32: 1e-4, torch.float64: 1e-4}
ROUNDING_OTHERWISE = 3e-2
"""How far the model's own logits may be from ours, relative to the largest: float16, bfloat16."""


@torch.inference_mode()
def final_hidden(model: Any, batch: WindowBatch) -> Tensor:
    """The hidden states [S,N,D] that the model's head would read, under whatever is applied.

    The head over whole windows costs as much as the layers, so `Head` applies it in slices. Asking
    the model for few logits instead would tell `apply` that the other tokens are a prompt.
    """
    device = model.device
    if batch.reply_tokens:
        return _branched(model, batch)
    mask = batch.attention_mask
    done = model.base_model(
        input_ids=batch.ids_SN.to(device),
        attention_mask=None if mask is None else mask.to(device),
        use_cache=False,
    )
    hidden_SND: Tensor = done[0]
    return hidden_SND


def hidden_of(
    model: Any,
    windows: Windows,
    what: str,
    batch_tokens: int = BATCH_TOKENS,
    decode_batch: int | None = None,
) -> Iterator[tuple[WindowBatch, Tensor]]:
    """Each batch of `windows` with its final hidden states [S,N,D]; `what` names the progress."""
    batches = windows.batches(batch_tokens, decode_batch)
    with bar(what, windows.tokens, "tokens") as advance:
        for batch in batches:
            yield batch, final_hidden(model, batch)
            advance(batch.tokens)


def _branched(model: Any, batch: WindowBatch) -> Tensor:
    done = model.base_model(**_branched_call(model, batch), use_cache=False)
    return unbranched(done[0], batch.ids_SN.shape[1], batch.prompt_tokens)


def _branched_call(model: Any, batch: WindowBatch) -> dict[str, Tensor]:
    length, prompt = batch.ids_SN.shape[1], batch.prompt_tokens
    positions, mask = branched_layout(length, prompt, batch.reply_tokens, model.dtype)
    ids = branched_ids(batch.ids_SN, prompt)
    call = {"input_ids": ids, "position_ids": positions, "attention_mask": mask}
    return {name: each.to(model.device) for name, each in call.items()}


@dataclass(frozen=True)
class CachedPrompts:
    """What attention keeps of a batch's windows, so that their replies can run without them."""

    batch: WindowBatch
    cache: Any
    """Transformers' own, as the model made it."""

    @classmethod
    @torch.inference_mode()
    def of(cls, model: Any, batch: WindowBatch) -> CachedPrompts:
        """Runs a batch with replies once, under what is applied: prompts stay under these rules."""
        cache = model.base_model(**_branched_call(model, batch), use_cache=True).past_key_values
        cache.crop(batch.prompt_tokens - batch.ids_SN.shape[1])  # as many as the replies have
        return cls(batch, cache)

    @torch.inference_mode()
    def final_hidden(self, model: Any) -> Tensor:
        """`final_hidden` of the replies alone [S,N,D], zeros at the prompt, which nobody reads.

        To `apply`, all tokens of this call decode: `prompt_tokens` is 0.
        """
        length = self.batch.ids_SN.shape[1]
        call = _branched_call(model, self.batch)
        call |= {name: call[name][:, length:] for name in ("input_ids", "position_ids")}
        call["attention_mask"] = call["attention_mask"][:, :, length:]
        # A call adds to a cache's layers by making new tensors, so copies leave this one as it is.
        again = copy(self.cache)
        again.layers = [copy(layer) for layer in self.cache.layers]
        done = model.base_model(**call, past_key_values=again, use_cache=True)
        return nn.functional.pad(done[0], (0, 0, self.batch.prompt_tokens, 0))


@dataclass(frozen=True)
class Head:
    """A linear head, in float32."""

    weight_VD: Tensor
    bias_V: Tensor | None
    scale: float

    @classmethod
    @torch.inference_mode()
    def of(cls, model: Any) -> Head:
        """The head of `model`, checked against the logits that the model itself computes.

        Raises LeanMoeError when they differ by more than rounding (the head is not linear) or the
        output matrix is not finite.
        """
        output = model.get_output_embeddings()
        weight = output.weight
        bias = getattr(output, "bias", None)
        head = cls(weight.float(), None if bias is None else bias.float(), 1.0)
        if not bool(weight.isfinite().all()):
            raise LeanMoeError(f"the output matrix of {type(model).__name__} holds NaN or infinity")
        draw = torch.Generator().manual_seed(0)
        probes_TD = torch.randn((PROBES, weight.shape[1]), generator=draw).to(weight)
        theirs_TV = _own_logits(model, probes_TD).float()
        ours_TV = head._logits(probes_TD)
        allowed = ROUNDING.get(weight.dtype, ROUNDING_OTHERWISE)
        scale = float((theirs_TV * ours_TV).sum() / ours_TV.square().sum())
        if abs(scale - 1) < allowed:
            scale = 1.0  # some families divide their logits by a constant
        off = float((theirs_TV - scale * ours_TV).abs().max() / theirs_TV.abs().max())
        if not off <= allowed:
            raise LeanMoeError(
                f"the head of {type(model).__name__} is not linear (its logits differ by "
                f"{off:.1%} from those of its output matrix): its divergence cannot be measured"
            )
        return cls(head.weight_VD, head.bias_V, scale)

    def log_normaliser(self, hidden_TD: Tensor) -> Tensor:
        """log Z [T] of the next-token distribution; not finite where a logit is not."""
        return torch.cat([_log_sum_exp_in_place(part)[0] for part in self._slices(hidden_TD)])

    def log_normaliser_and_likeliest(self, hidden_TD: Tensor) -> tuple[Tensor, Tensor]:
        """(log Z [T], the token [T] with the largest logit)."""
        normalisers, tokens = [], []
        for logits_TV in self._slices(hidden_TD):
            tokens.append(logits_TV.argmax(-1))
            normalisers.append(_log_sum_exp_in_place(logits_TV)[0])
        return torch.cat(normalisers), torch.cat(tokens)

    def expected(self, hidden_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(log Z [T], likeliest token [T], mean output vector [T, D] under the distribution)."""
        normalisers, tokens, means = [], [], []
        for logits_TV in self._slices(hidden_TD):
            tokens.append(logits_TV.argmax(-1))
            normaliser_T, sums_T = _log_sum_exp_in_place(logits_TV)
            normalisers.append(normaliser_T)
            means.append(logits_TV @ self.weight_VD / sums_T[:, None])
        return torch.cat(normalisers), torch.cat(tokens), torch.cat(means)

    def crossed(self, expected_TD: Tensor, hidden_TD: Tensor) -> Tensor:
        """The mean logit [T], float64, short of the bias: under the distribution whose mean output
        vector is `expected`, of the logits that `hidden` gives."""
        return (expected_TD.double() * hidden_TD.double()).sum(-1) * self.scale

    def logits_at(self, hidden_TD: Tensor, tokens_T: Tensor) -> Tensor:
        """One logit a token [T], float64: that of `tokens_T`."""
        logit_T = (hidden_TD.double() * self.weight_VD[tokens_T].double()).sum(-1)
        if self.bias_V is not None:
            logit_T = logit_T + self.bias_V[tokens_T].double()
        return logit_T * self.scale

    def _slices(self, hidden_TD: Tensor) -> Iterator[Tensor]:
        rows = max(1, SLICE_BYTES // (4 * self.weight_VD.shape[0]))
        for part_TD in torch.split(hidden_TD, rows):
            logits_TV = self._logits(part_TD)
            yield logits_TV if self.scale == 1.0 else logits_TV.mul_(self.scale)

    def _logits(self, hidden_TD: Tensor) -> Tensor:
        """[T, V], float32, before `scale`."""
        return nn.functional.linear(hidden_TD.float(), self.weight_VD, self.bias_V)


def _log_sum_exp_in_place(logits_TV: Tensor) -> tuple[Tensor, Tensor]:
    """(log Z [T], sums [T] of exp(logit - largest), which replace the logits in their memory)."""
    # torch.logsumexp makes two copies of the logits and takes three times as long.
    largest_T = logits_TV.amax(-1)
    sums_T = logits_TV.sub_(largest_T[:, None]).exp_().sum(-1)
    return sums_T.log() + largest_T, sums_T


class _Passthrough(nn.Module):
    """Stands in for the layers: returns the hidden states it is given as embeddings."""

    def forward(self, inputs_embeds: Tensor, **_others: Any) -> Any:
        from transformers.modeling_outputs import MoeModelOutputWithPast

        return MoeModelOutputWithPast(last_hidden_state=inputs_embeds)


def _own_logits(model: Any, hidden_TD: Tensor) -> Tensor:
    """Logits [T, V] as the model's own forward makes them of final hidden states."""
    prefix = model.base_model_prefix
    layers = model._modules[prefix]
    model._modules[prefix] = _Passthrough()
    try:
        # The class's own forward: what may be hooked to the instance concerns its layers.
        done = type(model).forward(model, inputs_embeds=hidden_TD[None], use_cache=False)
    finally:
        model._modules[prefix] = layers
    logits_TV: Tensor = done.logits[0]
    return logits_TV


@dataclass(frozen=True)
class Reference:
    """What the full model predicts on some windows: D + 6 numbers a scored token instead of V.

    `compare` scores other final hidden states of the same windows against it; see `head`.
    """

    windows: Windows
    head: Head
    expected_SND: Tensor
    """Mean output vector under the full model's next-token distribution; float32. This and what
    follows starts at the first position that is scored."""
    mean_log_SN: Tensor
    """Mean log-probability under it (minus its entropy), short of the head's bias; float64."""
    loss_SN: Tensor
    """-log p of the token that follows; float64."""
    likeliest_SN: Tensor
    """The token with the largest logit."""

    @torch.inference_mode()
    def compare(self, batch: WindowBatch, hidden_SND: Tensor) -> Divergence:
        """Scores final hidden states of `batch` under a plan: sums over the batch's documents.

        Raises LeanMoeError, naming the document, when a logit is not a finite number.
        """
        at = _Predicted(batch, self.windows, hidden_SND)
        log_normaliser_T, likeliest_T = self.head.log_normaliser_and_likeliest(at.hidden_TD)
        normaliser_T = at.require_finite(log_normaliser_T)
        crossed_T = self.head.crossed(self.expected_SND[at.places], at.hidden_TD)
        kl_T = self.mean_log_SN[at.places] - crossed_T + normaliser_T
        loss_T = normaliser_T - self.head.logits_at(at.hidden_TD, at.following_T)
        flips_T = likeliest_T != self.likeliest_SN[at.places]
        full = at.losses(self.loss_SN[at.places])
        return Divergence(at.sums(kl_T), at.sums(flips_T), at.losses(loss_T), full)


@torch.inference_mode()
def reference(model: Any, windows: Windows, batch_tokens: int = BATCH_TOKENS) -> Reference:
    """One pass of the full model over `windows`, kept for `Reference.compare`.

    Takes 4 (D + 6) bytes a scored token. Nothing may be applied to the model at the time.
    Raises LeanMoeError, naming the document, when a logit is not a finite number.
    """
    head = Head.of(model)
    rows, length = windows.ids_SN.shape
    device = head.weight_VD.device
    read = length - 1 - windows.prompt_tokens
    expected_SND = torch.zeros((rows, read, head.weight_VD.shape[1]), device=device)
    mean_log_SN = torch.zeros((rows, read), dtype=torch.float64, device=device)
    loss_SN, likeliest_SN = torch.zeros_like(mean_log_SN), torch.zeros_like(mean_log_SN).long()
    for batch, hidden_SND in hidden_of(model, windows, "Full model", batch_tokens):
        at = _Predicted(batch, windows, hidden_SND)
        log_normaliser_T, likeliest_T, expected_TD = head.expected(at.hidden_TD)
        normaliser_T = at.require_finite(log_normaliser_T)
        likeliest_SN[at.places] = likeliest_T
        expected_SND[at.places] = expected_TD
        mean_log_SN[at.places] = head.crossed(expected_TD, at.hidden_TD) - normaliser_T
        loss_SN[at.places] = normaliser_T - head.logits_at(at.hidden_TD, at.following_T)
    return Reference(windows, head, expected_SND, mean_log_SN, loss_SN, likeliest_SN)


def divergence(
    model: Any,
    against: Reference,
    what: str = "Plan",
    decode_batch: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
    draw: int = 0,
) -> Divergence:
    """KL(full ‖ plan) and both losses per document, under whatever is applied to the model now.

    `decode_batch` must be that of the `apply` at work; `what` names the progress bar. Another
    `draw` puts the windows in batches with others. Raises LeanMoeError, naming the document, when
    a logit is not a finite number.
    """
    windows = replace(against.windows, seed=against.windows.seed + draw)
    first, *others = (
        against.compare(batch, hidden_SND)
        for batch, hidden_SND in hidden_of(model, windows, what, batch_tokens, decode_batch)
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
        self.names, self.sources = windows.names, windows.sources
        self.documents_T = windows.documents_S[numbers_T]
        self.following_T = batch.ids_SN[rows_T, positions_T + 1].to(device)
        self.places = (numbers_T.to(device), (positions_T - windows.prompt_tokens).to(device))
        """Rows of the windows, and positions from the first that is scored."""
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
        return Losses(self.names, self.sums(loss_T), tokens, self.sources)
