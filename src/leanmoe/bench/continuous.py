"""Transformers' continuous batching in this process: a manager that fits a load, and its runs."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from leanmoe.bench.attention import attention_per_request, has_pages
from leanmoe.bench.metrics import Request, Timeline
from leanmoe.core.errors import LeanMoeError
from leanmoe.core.quiet import quiet_loggers
from leanmoe.runtime import release_threads, why_not_full_attention

PREFILL_TOKENS_A_STEP = 2048
"""A step takes as many whole prompts as fit in this, beside what decodes; a longer prompt is
prefilled in chunks of it. Large steps are what throughput is tuned with: 512 made the full
reference model 15% slower at 32 requests (2 cores)."""
SECONDS_WITHOUT_RESULT = 120.0


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
        """Of a step at most; chunks of prompts where whole ones would do cost attention."""
        whole = PREFILL_TOKENS_A_STEP // self.longest_prompt * self.longest_prompt
        return (whole or PREFILL_TOKENS_A_STEP) + self.decode_batch

    @property
    def page(self) -> int:
        """As long as the longest request, so that each has a page of its own."""
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
    """A running manager of continuous batching whose cache fits the load, and no more."""
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
        if model.device.type == "cpu" and why_not_full_attention(model.config) is None:
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
    is fewer than what is cached. Its caches hold keys and values of one width only.
    """
    whole = getattr(config, "qk_head_dim", None)
    if whole is None:
        yield
        return
    if whole != config.v_head_dim:
        raise LeanMoeError(
            f"this model caches keys {whole} wide and values {config.v_head_dim} wide: "
            "Transformers' continuous batching cannot serve it"
        )
    before = config.head_dim
    config.head_dim = whole
    try:
        yield
    finally:
        config.head_dim = before
