"""Attention for continuous batching without a GPU: each request attends to its own cache alone.

Transformers' SDPA path for continuous batching scores every token of a step against the cached
tokens of all requests and masks what is not its own, so a step's attention grows with the square
of the load. Its variable-length path needs a flash kernel, which a CPU does not have. This is
that path in plain torch: the same arguments, one product a request.

Letters: H heads, Q tokens of the step, C cached and new tokens of all its requests, W head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

NAME = "leanmoe_flash_per_request"
"""Transformers gives an implementation sequence lengths instead of masks if its name says flash."""


@contextmanager
def attention_per_request(model: Any) -> Iterator[None]:
    """Switches the model's attention for the body of the `with`; as it was, afterwards."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if NAME not in ALL_ATTENTION_FUNCTIONS:
        ALL_ATTENTION_FUNCTIONS.register(NAME, attend_per_request)
    before = model.config._attn_implementation
    model.config._attn_implementation = NAME
    try:
        yield
    finally:
        model.config._attn_implementation = before


def attend_per_request(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    cache: Any = None,
    **keywords: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention interface: (1,H,Q,W) queries to (1,Q,H,W), request by request.

    Keys and values are repeated for grouped queries by SDPA itself. Greater numbers of requests
    cost one call each; every call reads only what its request cached.
    """
    del attention_mask
    if cache is not None:
        key, value = cache.update(
            key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=keywords
        )
    queries: list[int] = keywords["cu_seq_lens_q"].tolist()
    cached: list[int] = keywords["cu_seq_lens_k"].tolist()
    parts = [
        _attend(query[:, :, q0:q1], key[:, :, c0:c1], value[:, :, c0:c1], scaling)
        for q0, q1, c0, c1 in zip(queries, queries[1:], cached, cached[1:], strict=False)
    ]
    return torch.cat(parts, dim=2).transpose(1, 2), None


def _attend(query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
    new, known = query.shape[2], key.shape[2]
    mask = None
    if 1 < new < known:  # a prompt in chunks: each new token sees the cache and those before it
        mask = torch.ones(new, known, dtype=torch.bool, device=query.device).tril(known - new)
    out: Tensor = functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=new > 1 and mask is None,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out
