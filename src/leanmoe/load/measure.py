"""A service load on one model, in process, through Transformers' continuous batching."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from leanmoe.errors import LeanMoeError
from leanmoe.load.attention import attention_per_request, has_pages
from leanmoe.load.metrics import Load, Measurement, Ratio, Timeline
from leanmoe.progress import bar
from leanmoe.runtime import release_threads, why_not_full_attention

PREFILL_TOKENS_A_STEP = 2048
"""A step takes as many whole prompts as fit in this, beside what decodes; a longer prompt is
prefilled in chunks of it. Large steps are what throughput is tuned with: 512 made the full
reference model 15% slower at 32 requests (2 cores)."""
SECONDS_WITHOUT_RESULT = 120.0
WARM_UP_OUTPUT = 4


@dataclass(frozen=True)
class Variant:
    """Something to run the load on: a context that sets the model up, and what to call it."""

    name: str
    context: Callable[[], AbstractContextManager[Any]]
    repeats: int | None = None
    """At most so many of the repeats: for what only stands beside, and takes long."""


@dataclass(frozen=True)
class Comparison:
    """The same load on several variants, interleaved."""

    load: Load
    runs: Mapping[str, tuple[Measurement, ...]]

    def ratio(self, name: str, confidence: float = 0.95) -> Ratio:
        """Output throughput of variant `name` over the first variant's."""
        first = next(iter(self.runs.values()))
        return Ratio.of(
            [run.output_throughput for run in first],
            [run.output_throughput for run in self.runs[name]],
            confidence,
        )

    def median_run(self, name: str) -> Measurement:
        """The run of median throughput."""
        runs = sorted(self.runs[name], key=lambda run: run.output_throughput)
        return runs[len(runs) // 2]

    def to_json(self) -> dict[str, Any]:
        """The load, each variant's median run and all its throughputs."""
        return {
            "concurrency": self.load.concurrency,
            "input_tokens": self.load.input_tokens,
            "output_tokens": self.load.output_tokens,
            "requests": self.load.requests,
            "variants": {
                name: {
                    **self.median_run(name).to_json(),
                    "runs": [run.output_throughput for run in runs],
                }
                for name, runs in self.runs.items()
            },
            "label": "measured",
        }


def compare(
    model: Any,
    prompts: Sequence[Sequence[int]],
    load: Load,
    variants: Sequence[Variant],
    repeats: int = 5,
    seed: int = 0,
) -> Comparison:
    """Runs `load` on every variant `repeats` times, in an order drawn anew for each repeat.

    Requests take `prompts` in turn, cut to the load's input length; decoding is greedy and never
    stops early, so that every variant makes the same number of tokens. Raises LeanMoeError when
    a prompt is too short, the model cannot be served this way, or a request fails.
    """
    load.check()
    cut = [list(prompt[: load.input_tokens]) for prompt in prompts]
    shortest = min(map(len, cut), default=0)
    if shortest < load.input_tokens:
        given = f"a prompt of {shortest} tokens" if cut else "no prompt"
        raise LeanMoeError(f"{given} was given: the load needs prompts of {load.input_tokens}")
    order = random.Random(seed)
    runs: dict[str, list[Measurement]] = {variant.name: [] for variant in variants}
    what = f"Load, {load.concurrency} at once"
    wanted = {v.name: repeats if v.repeats is None else min(v.repeats, repeats) for v in variants}
    total = len(variants) + sum(wanted.values())
    with _served(model, load) as manager, bar(what, total, "runs") as advance:
        for variant in variants:  # memory, kernels and caches of every variant are warm
            with variant.context():
                _run(
                    manager,
                    cut,
                    Load(load.concurrency, load.input_tokens, WARM_UP_OUTPUT, load.concurrency),
                )
            advance(1)
        for repeat in range(repeats):
            taking_part = [variant for variant in variants if repeat < wanted[variant.name]]
            for variant in order.sample(taking_part, len(taking_part)):
                with variant.context():
                    timelines = _run(manager, cut, load)
                runs[variant.name].append(Measurement.of(load, timelines))
                advance(1)
    return Comparison(load, {name: tuple(found) for name, found in runs.items()})


@contextmanager
def _served(model: Any, load: Load) -> Iterator[Any]:
    """A running manager of continuous batching whose cache fits the load, and no more."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    length = load.input_tokens + load.output_tokens
    page = max(64, 1 << (length - 1).bit_length())
    settings = ContinuousBatchingConfig(
        **{"page_size" if has_pages() else "block_size": page},
        num_blocks=load.concurrency + 4,
        max_batch_tokens=_step_tokens(load),
        max_requests_per_batch=load.concurrency,
        allow_block_sharing=False,  # shared prefixes would spare one variant's prefill
        use_async_batching=False if model.device.type == "cpu" else None,
    )
    generation = GenerationConfig(
        max_new_tokens=load.output_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    with ExitStack() as stack:
        stack.enter_context(_quiet("ContinuousBatchingLogger"))
        stack.enter_context(_cache_width(model.config))
        if model.device.type == "cpu" and why_not_full_attention(model.config) is None:
            stack.enter_context(attention_per_request(model, page))
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


def _step_tokens(load: Load) -> int:
    """Tokens of a step at most; chunks of prompts where whole ones would do cost attention."""
    whole = PREFILL_TOKENS_A_STEP // load.input_tokens * load.input_tokens
    return (whole or PREFILL_TOKENS_A_STEP) + load.concurrency


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


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Keeps a logger's remarks on settings off the screen; failures are raised, not logged."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def _run(manager: Any, prompts: Sequence[list[int]], load: Load) -> list[Timeline]:
    """One closed loop: `concurrency` requests are always under way until all are done."""
    release_threads()  # continuous batching computes in a thread of its own
    sent: dict[str, float] = {}
    timelines: list[Timeline] = []

    def send() -> None:
        now = time.perf_counter()
        name = manager.add_request(
            prompts[len(sent) % len(prompts)],
            max_new_tokens=load.output_tokens,
            record_timestamps=True,
            eos_token_id=-1,
        )
        if name is None:
            raise LeanMoeError("continuous batching refused a request: its thread has stopped")
        sent[name] = now

    for _ in range(load.concurrency):
        send()
    while len(timelines) < load.requests:
        timelines.append(_finished(manager, sent, load))
        if len(sent) < load.requests:
            send()
    return timelines


def _finished(manager: Any, sent: Mapping[str, float], load: Load) -> Timeline:
    deadline = time.monotonic() + SECONDS_WITHOUT_RESULT
    while time.monotonic() < deadline:
        output = manager.get_result(timeout=1)
        if output is not None and output.is_finished():
            return _timeline(output, sent, load)
        if output is None and not manager.is_running():
            raise LeanMoeError("continuous batching stopped before its requests were done")
    raise LeanMoeError(
        f"continuous batching gave no result for {SECONDS_WITHOUT_RESULT:.0f} seconds"
    )


def _timeline(output: Any, sent: Mapping[str, float], load: Load) -> Timeline:
    if output.error is not None:
        reason = (str(output.error).strip().splitlines() or ["unknown"])[-1]
        raise LeanMoeError(f"continuous batching failed on a request: {reason}")
    if len(output.generated_tokens) != load.output_tokens:
        raise LeanMoeError(
            f"a request returned {len(output.generated_tokens)} tokens: "
            f"{load.output_tokens} were asked for"
        )
    stamps = np.maximum.accumulate(output.timestamps)
    return Timeline(sent[output.request_id], tuple(float(stamp) for stamp in stamps))
