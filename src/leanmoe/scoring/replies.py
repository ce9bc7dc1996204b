"""Replies that branch off one prompt: many short replies scored in a single forward pass.

A service that reads a few tokens after a long prompt is scored on just those. One pass per reply
would run hundreds of tokens to score a few. Here a window runs once as a prompt, and beside it its
last part a second time, cut into replies: each token of a reply sees the prompt's tokens before
the reply and the reply's own before itself, as it would in service.

Letters: N windows, L tokens in a window, P of them before the first reply, R = L - P in replies,
C = L + R tokens of a row in the call.

Only for models whose tokens see all tokens before them: `runtime.why_not_full_attention`.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


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
