"""Attention for continuous batching without a GPU: every request attends to its own, in place.

Transformers' SDPA path for continuous batching scores every token of a step against the cached
tokens of all requests and masks what is not its own, so a step's attention grows with the square
of the load; and it copies all that is cached in every layer of every step. Its way around both
needs a flash kernel, which a CPU does not have. This is that way in plain torch: the same
arguments, keys and values kept where they were written, and one product a request.

Letters: H heads, T tokens of the step, S requests; a head is `width` wide.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from leanmoe.core.errors import LeanMoeError

NAME, FLASH_NAME = "leanmoe_per_request", "leanmoe_flash_per_request"
"""Newer Transformers serve only implementations whose names say flash; 5.17 looks for a kernel of
such a name on the hub, and wants its own mark before the name."""


@dataclass(frozen=True)
class Piece:
    """One request's part in a step."""

    new: slice
    """Which of the step's tokens."""
    known: slice
    """Which slots hold its cached and new tokens."""


class RequestCache:
    """Keys and values of all layers, by the slot numbers of Transformers' paged cache.

    A request's slots follow one another if a page is as long as the longest request, which
    `leanmoe.bench.compare` sees to.
    """

    def __init__(self, page: int) -> None:
        self.page = page
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._pieces: list[Piece] = []
        self._layer = -1

    def pieces(self, layer: int, keywords: dict[str, Any]) -> list[Piece]:
        """The requests of the step; read once a step, in its first layer."""
        if layer <= self._layer or not self._pieces:
            self._pieces = _pieces(keywords)
        self._layer = layer
        return self._pieces

    def write(
        self, layer: int, pieces: list[Piece], key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Stores (1,H,T,width) keys and values; returns the layer's, (H,slots,width)."""
        keys, values = self._room(layer, max(piece.known.stop for piece in pieces), key, value)
        for piece in pieces:
            here = slice(piece.known.stop - (piece.new.stop - piece.new.start), piece.known.stop)
            keys[:, here] = key[0, :, piece.new]
            values[:, here] = value[0, :, piece.new]
        return keys, values

    def _room(self, layer: int, needed: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        known = self._layers.get(layer)
        have = 0 if known is None else known[0].shape[1]
        if known is not None and needed <= have:
            return known
        slots = max(2 * have, (needed + self.page - 1) // self.page * self.page)
        grown = []
        for place, new in enumerate((key, value)):
            room = new.new_empty(new.shape[1], slots, new.shape[3])
            if known is not None:
                room[:, :have] = known[place]
            grown.append(room)
        self._layers[layer] = (grown[0], grown[1])
        return self._layers[layer]


_serving: list[RequestCache] = []
"""The cache of the model that is served now, if any."""


@contextmanager
def attention_per_request(model: Any, page: int) -> Iterator[None]:
    """Switches the model's attention for the body of the `with`; as it was, afterwards.

    `page` is the page size of the cache: no request may be longer.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if _serving:
        raise LeanMoeError("a model is being served already: one at a time")
    for name in (FLASH_NAME, NAME, f"paged|{NAME}"):
        if name not in ALL_ATTENTION_FUNCTIONS:
            ALL_ATTENTION_FUNCTIONS.register(name, attend_per_request)
    before = model.config._attn_implementation
    model.config._attn_implementation = FLASH_NAME if has_pages() else NAME
    _serving.append(RequestCache(page))
    try:
        yield
    finally:
        _serving.clear()
        model.config._attn_implementation = before


def has_pages() -> bool:
    """Whether Transformers' continuous batching speaks of pages: it has since after 5.17."""
    from transformers import ContinuousBatchingConfig

    return "page_size" in {field.name for field in fields(ContinuousBatchingConfig)}


def attend_per_request(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **keywords: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention interface, by request: (1,H,T,width) queries to (1,T,H,width).

    Keys and values are repeated for grouped queries by SDPA itself. Every call reads only what
    its request cached.
    """
    del attention_mask
    for name in ("s_aux", "sliding_window"):
        if keywords.get(name) is not None:
            raise LeanMoeError(f"attention by request was asked for {name}: it has none")
    cache = _serving[0]
    pieces = cache.pieces(module.layer_idx, keywords)
    keys, values = cache.write(module.layer_idx, pieces, key, value)
    out = query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])
    for piece in pieces:
        new, known = piece.new, piece.known
        if known.stop - known.start == new.stop - new.start:  # a whole prompt: nothing is cached
            attended = _attend(query[:, :, new], key[:, :, new], value[:, :, new], scaling)
        else:
            past = keys[None, :, known], values[None, :, known]
            attended = _attend(query[:, :, new], *past, scaling)
        out[:, new] = attended.transpose(1, 2)
    return out, None


def _pieces(keywords: dict[str, Any]) -> list[Piece]:
    starts_S = keywords["cu_seq_lens_q"]
    known_S = keywords["cu_seq_lens_k"]
    known_S = next(iter(known_S.values())) if isinstance(known_S, dict) else known_S
    starts: list[int] = starts_S.tolist()
    lengths: list[int] = known_S.diff().tolist()
    ends: list[int] = (keywords["write_index"][0][starts_S[1:].long() - 1] + 1).tolist()
    return [
        Piece(slice(first, after), slice(end - length, end))
        for first, after, end, length in zip(starts, starts[1:], ends, lengths, strict=False)
    ]


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
