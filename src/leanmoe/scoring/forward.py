"""A model run over batches of windows, up to the hidden states that its head would read.

Letters: N windows in a batch, L tokens in a window, D hidden width.

The model's head applied in slices: what is needed of the logits, never all of them at once.

Letters: T tokens, D hidden width, V vocabulary.

A head is linear: logits = scale · (W h + b). So the divergence from the full model's distribution
p needs p only through its mean output vector, `expected` = Σ_v p_v W_v:

    KL(p ‖ q) = [Σ_v p_v logit_p(v) − log Z_p] − [Σ_v p_v logit_q(v) − log Z_q]
              = scale · expected · (h_p − h_q) + log Z_q − log Z_p.

D numbers a token then stand for the full model's V probabilities, and a plan is compared with it
at the price of the plan's own log Z.

Replies that branch off one prompt: many short replies scored in a single forward pass.

A service that reads a few tokens after a long prompt is scored on just those. One pass per reply
would run hundreds of tokens to score a few. Here a window runs once as a prompt, and beside it its
last part a second time, cut into replies: each token of a reply sees the prompt's tokens before
the reply and the reply's own before itself, as it would in service.

Letters: N windows, L tokens in a window, P of them before the first reply, R = L - P in replies,
C = L + R tokens of a row in the call.

Only for models whose tokens see all tokens before them: `runtime.why_not_full_attention`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from leanmoe.core.errors import LeanMoeError
from leanmoe.core.progress import bar
from leanmoe.scoring.windows import BATCH_TOKENS, Batch, Windows


@torch.inference_mode()
def final_hidden(model: Any, batch: Batch) -> Tensor:
    """The hidden states [N, L, D] that the model's head would read, under whatever is applied.

    Runs the model below its head. The head over whole windows costs as much as the layers and is
    applied in slices elsewhere; asking the model for few logits instead would tell `apply` that
    the other tokens are a prompt.
    """
    device = model.device
    if batch.reply_tokens:
        return _branched(model, batch)
    mask = batch.attention_mask
    done = model.base_model(
        input_ids=batch.ids_NL.to(device),
        attention_mask=None if mask is None else mask.to(device),
        use_cache=False,
    )
    hidden_NLD: Tensor = done[0]
    return hidden_NLD


def _branched(model: Any, batch: Batch) -> Tensor:
    length, prompt = batch.ids_NL.shape[1], batch.prompt_tokens
    positions, mask = branched_layout(length, prompt, batch.reply_tokens, model.dtype)
    done = model.base_model(
        input_ids=branched_ids(batch.ids_NL, prompt).to(model.device),
        position_ids=positions.to(model.device),
        attention_mask=mask.to(model.device),
        use_cache=False,
    )
    return unbranched(done[0], length, prompt)


def hidden_of(
    model: Any,
    windows: Windows,
    what: str,
    batch_tokens: int = BATCH_TOKENS,
    decode_batch: int | None = None,
) -> Iterator[tuple[Batch, Tensor]]:
    """Each batch of `windows` with its final hidden states [N, L, D]; `what` names the progress."""
    batches = windows.batches(batch_tokens, decode_batch)
    with bar(what, windows.tokens, "tokens") as advance:
        for batch in batches:
            yield batch, final_hidden(model, batch)
            advance(batch.tokens)


SLICE_BYTES = 32 * 1024**2
"""Of float32 logits held at once."""
PROBES = 4
ROUNDING = {torch.float32: 1e-4, torch.float64: 1e-4}

ROUNDING_OTHERWISE = 3e-2
"""How far the model's own logits may be from ours, relative to the largest: float16, bfloat16."""


class _Passthrough(nn.Module):
    """Stands in for the layers: returns the hidden states it is given as embeddings."""

    def forward(self, inputs_embeds: Tensor, **_others: Any) -> Any:
        from transformers.modeling_outputs import MoeModelOutputWithPast

        return MoeModelOutputWithPast(last_hidden_state=inputs_embeds)


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

    def expected(self, hidden_TD: Tensor) -> tuple[Tensor, Tensor]:
        """(log Z [T], mean output vector [T, D] under the next-token distribution)."""
        normalisers, means = [], []
        for logits_TV in self._slices(hidden_TD):
            normaliser_T, sums_T = _log_sum_exp_in_place(logits_TV)
            normalisers.append(normaliser_T)
            means.append(logits_TV @ self.weight_VD / sums_T[:, None])
        return torch.cat(normalisers), torch.cat(means)

    def shared_mass(self, first_TD: Tensor, second_TD: Tensor) -> Tensor:
        """Σ_v min(p_v, q_v) [T] of two next-token distributions: 1 where they are the same."""
        parts = zip(self._slices(first_TD), self._slices(second_TD), strict=True)
        return torch.cat([torch.minimum(a.softmax(-1), b.softmax(-1)).sum(-1) for a, b in parts])

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


def branched_ids(ids_NL: Tensor, prompt: int) -> Tensor:
    """Rows [N,C]: the window, then its tokens after the first `prompt` again."""
    return torch.cat([ids_NL, ids_NL[:, prompt:]], dim=1)


@lru_cache(maxsize=16)
def branched_layout(
    length: int, prompt: int, reply: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Position ids [1,C] and the attention mask [1,1,C,C], to be added to scores, of such rows.

    Reply number n holds window positions prompt + n x reply to prompt + (n+1) x reply - 1. Its
    first token is the last one of its prompt: the one whose prediction is the reply's first token.
    """
    position_L = torch.arange(length)
    position_R = position_L[prompt:]
    start_R = prompt + (position_R - prompt) // reply * reply
    prompt_sees_LL = position_L[:, None] >= position_L[None, :]
    reply_sees_RL = start_R[:, None] > position_L[None, :]
    same_RR = start_R[:, None] == start_R[None, :]
    reply_sees_RR = same_RR & (position_R[:, None] >= position_R[None, :])
    top_LC = torch.cat([prompt_sees_LL, torch.zeros(length, length - prompt).bool()], dim=1)
    bottom_RC = torch.cat([reply_sees_RL, reply_sees_RR], dim=1)
    sees_CC = torch.cat([top_LC, bottom_RC])
    mask_CC = torch.zeros(sees_CC.shape, dtype=dtype).masked_fill(~sees_CC, torch.finfo(dtype).min)
    return torch.cat([position_L, position_R])[None], mask_CC[None, None]


def unbranched(hidden_NCD: Tensor, length: int, prompt: int) -> Tensor:
    """Final hidden states [N,L,D] of the windows, those of the replies in their places."""
    return torch.cat([hidden_NCD[:, :prompt], hidden_NCD[:, length:]], dim=1)
