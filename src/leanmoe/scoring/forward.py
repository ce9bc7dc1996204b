"""A model run over batches of windows, up to the hidden states that its head would read.

Letters: N windows in a batch, L tokens in a window, D hidden width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from leanmoe.core.progress import bar
from leanmoe.scoring.replies import branched_ids, branched_layout, unbranched
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
