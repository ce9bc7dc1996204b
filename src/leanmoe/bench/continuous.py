"""Transformers' continuous batching in this process: a manager that fits a load, and its runs.

On a CPU the attention is ours. Transformers' SDPA path for continuous batching scores every token
of a step against the cached tokens of all requests and masks what is not its own, so a step's
attention grows with the square of the load; and it copies all that is cached in every layer of
every step. Its way around both needs a flash kernel, which a CPU does not have. Ours is that way in
plain torch: the same arguments, keys and values kept where they were written, and one product a
request.

Letters: H heads, T tokens of the step, S requests; a head is `width` wide.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from leanmoe.bench.measurement import Request, Timeline
from leanmoe.core.errors import LeanMoeError
from leanmoe.core.quiet import quiet_loggers
from leanmoe.runtime import partial_attention_reason, release_threads, require_batching

PREFILL_TOKENS_A_STEP = 2048
"""A step takes as many whole prompts as fit in this, beside what decodes; a longer prompt is
prefilled in chunks of it. Large steps are what throughput is tuned with: 512 made the full
reference model 15% slower at 32 requests (2 cores)."""
SECONDS_WITHOUT_RESULT = 120.0
NAME, FLASH_NAME = "leanmoe_per_request", "leanmoe_flash_per_request"
"""Names of our attention. Transformers after 5.17 serve only implementations whose names say flash;
5.17 looks for a kernel of such a name on the hub, and wants its own mark before the name."""


@dataclass(frozen=True)
class Room:
    """What the cache of a service must hold."""

    decode_batch: int
    """Requests under way at most."""
    longest_prompt: int
    longest: int
    """Tokens of prompt and reply."""

    @property
    def step_tokens(self) -> int:
        """The most tokens of a step; chunks of prompts where whole ones would do cost attention."""
        whole = PREFILL_TOKENS_A_STEP // self.longest_prompt * self.longest_prompt
        return (whole or PREFILL_TOKENS_A_STEP) + self.decode_batch

    @property
    def page(self) -> int:
        """The length of the longest request, so that each has a page of its own."""
        return max(64, 1 << (self.longest - 1).bit_length())


class Arrivals:
    """When a run may send its next request."""

    def __init__(self, decode_batch: int, gaps: Sequence[float] | None = None) -> None:
        """A closed loop of `decode_batch` requests; with `gaps`, an open loop: seconds between."""
        self._concurrency = decode_batch
        self._due = None if gaps is None else np.cumsum(gaps).tolist()

    @classmethod
    def poisson(cls, rate: float, requests: int, seed: str) -> Arrivals:
        """An open loop: gaps are exponential with mean 1 / rate, the first request comes at once.

        `vllm bench serve` draws the same gaps where its burstiness is 1.
        """
        rng = random.Random(seed)
        return cls(requests, [0.0, *(rng.expovariate(rate) for _ in range(requests - 1))])

    @property
    def is_open(self) -> bool:
        """Whether requests come at times of their own."""
        return self._due is not None

    def wait(self, sent: int, under_way: int, elapsed: float) -> float:
        """Seconds until request number `sent` may go; infinity while the loop is full."""
        if self._due is not None:
            return max(0.0, float(self._due[sent]) - elapsed)
        return 0.0 if under_way < self._concurrency else float("inf")

    def delay(self, sent: int, elapsed: float) -> float:
        """How late request number `sent` is; 0 in a closed loop."""
        return 0.0 if self._due is None else max(0.0, elapsed - float(self._due[sent]))


@contextmanager
def served(model: Any, room: Room, most_output: int) -> Iterator[Any]:
    """A running manager of continuous batching whose cache fits the load, and no more.

    Raises LeanMoeError where continuous batching cannot hold the model's caches.
    """
    require_batching(model)
    from transformers import ContinuousBatchingConfig, GenerationConfig

    settings = ContinuousBatchingConfig(
        **{"page_size" if has_pages() else "block_size": room.page},
        num_blocks=room.decode_batch + 4,
        max_batch_tokens=room.step_tokens,
        max_requests_per_batch=room.decode_batch,
        allow_block_sharing=False,  # shared prefixes would spare one variant's prefill
        use_async_batching=False if model.device.type == "cpu" else None,
    )
    generation = GenerationConfig(
        max_new_tokens=most_output, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    with ExitStack() as stack:
        stack.enter_context(quiet_loggers("ContinuousBatchingLogger", level=logging.CRITICAL))
        stack.enter_context(_cache_width(model.config))
        if model.device.type == "cpu" and partial_attention_reason(model.config) is None:
            stack.enter_context(attention_per_request(model, room.page))
        manager = stack.enter_context(
            model.continuous_batching_context_manager(
                generation_config=generation,
                continuous_batching_config=settings,
                block=True,
                timeout=10,
                warmup=model.device.type != "cpu",
            )
        )
        yield manager


def run(
    manager: Any,
    requests: Sequence[Request],
    arrivals: Arrivals,
    max_seconds: float = float("inf"),
) -> list[Timeline]:
    """Sends the requests as `arrivals` allow until all are done; none after `max_seconds`.

    Decoding is greedy and never stops early. Raises LeanMoeError when a request fails or none
    comes back.
    """
    release_threads()  # continuous batching computes in a thread of its own
    sent: dict[str, tuple[Request, float, float]] = {}
    timelines: list[Timeline] = []
    start = last = time.perf_counter()
    total = len(requests)
    while len(timelines) < total:
        now = time.perf_counter()
        if now - start > max_seconds:
            total = max(len(sent), 1)
        wait = 1.0
        if len(sent) < total:
            wait = arrivals.wait(len(sent), len(sent) - len(timelines), now - start)
            if wait == 0:
                delay = arrivals.delay(len(sent), now - start)
                request = requests[len(sent)]
                sent[_send(manager, request)] = (request, now, delay)
                continue
        output = manager.get_result(timeout=min(wait, 1.0))
        if output is not None and output.is_finished():
            timelines.append(_timeline(output, sent))
            last = time.perf_counter()
        elif output is None:
            _check_alive(manager, now - last if len(sent) > len(timelines) else 0.0)
    return timelines


def _send(manager: Any, request: Request) -> str:
    name = manager.add_request(
        list(request.prompt),
        max_new_tokens=request.output_tokens,
        record_timestamps=True,
        eos_token_id=-1,
    )
    if name is None:
        raise LeanMoeError("continuous batching refused a request: its thread has stopped")
    return str(name)


def _check_alive(manager: Any, silent: float) -> None:
    if not manager.is_running():
        raise LeanMoeError("continuous batching stopped before its requests were done")
    if silent > SECONDS_WITHOUT_RESULT:
        raise LeanMoeError(
            f"continuous batching gave no result for {SECONDS_WITHOUT_RESULT:.0f} seconds"
        )


def _timeline(output: Any, sent: Mapping[str, tuple[Request, float, float]]) -> Timeline:
    request, moment, delay = sent[output.request_id]
    if output.error is not None:
        reason = (str(output.error).strip().splitlines() or ["unknown"])[-1]
        raise LeanMoeError(f"continuous batching failed on a request: {reason}")
    if len(output.generated_tokens) != request.output_tokens:
        raise LeanMoeError(
            f"a request returned {len(output.generated_tokens)} tokens: "
            f"{request.output_tokens} were asked for"
        )
    stamps = np.maximum.accumulate(output.timestamps)
    return Timeline(
        moment,
        tuple(float(stamp) for stamp in stamps),
        len(request.prompt),
        request.output_tokens,
        delay,
    )


@contextmanager
def _cache_width(config: Any) -> Iterator[None]:
    """Tells continuous batching how wide a cached head is, where the config says it of the rope.

    Its cache takes `head_dim`; for DeepSeek's MLA Transformers sets that to the rotary part, which
    is fewer than what is cached.
    """
    whole = getattr(config, "qk_head_dim", None)
    if whole is None:
        yield
        return
    before = config.head_dim
    config.head_dim = whole
    try:
        yield
    finally:
        config.head_dim = before


@dataclass(frozen=True)
class Piece:
    """One request's part in a step."""

    new: slice
    """Which of the step's tokens."""
    known: slice
    """Which slots hold its cached and new tokens."""


class RequestCache:
    """Keys and values of all layers, by the slot numbers of Transformers' paged cache.

    A request's slots follow one another if a page is as long as the longest request: `Room.page`.
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
