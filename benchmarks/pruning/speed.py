"""How fast are pruned checkpoints, and skipping, at each load, and how large? Part of `measure`.

Single steps are timed: a decode step of B requests that have 128 tokens each behind them, and a
step with 8 prompts of 128. In each round every variant takes one step at every load, in an order
drawn anew, right after a step that is not timed, so that none profits from what ran before it.
Speed is the full model's time over the variant's in the same round. What is shown is the median
over rounds with the interval of order statistics, which some slow rounds do not move. All variants
attend to what the full model cached: what is in a cache does not change how long it takes.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from scipy import stats
from transformers import DynamicCache

from leanmoe import apply
from leanmoe.core.progress import bar
from leanmoe.core.run_folder import RunFolder
from leanmoe.core.text import Document
from leanmoe.plan import Plan

PROMPT_TOKENS = 128
PROMPTS = 8
"""In the step of prompts."""
PROMPT = "prompts"
LOADS = (1, 8, 32)
STEPS = (PROMPT, *map(str, LOADS))
FEWEST_ROUNDS = 6
"""For an interval of 95%: the least and greatest of six bracket the median with 97%."""
Pair = tuple[str, str]
Steps = dict[str, tuple[torch.Tensor, Any]]


@dataclass(frozen=True)
class Variant:
    """A model and the plan it runs under."""

    name: Pair
    model: Any
    plan: Plan


@dataclass(frozen=True)
class Speed:
    """Median of paired ratios with its interval."""

    median: float
    low: float
    high: float
    rounds: int

    @classmethod
    def of(cls, first: Sequence[float], other: Sequence[float]) -> Speed:
        """Seconds of `first` over seconds of `other`, round by round, with 95% confidence."""
        ratios = sorted(a / b for a, b in zip(first, other, strict=True))
        place = int(stats.binom.ppf(0.025, len(ratios), 0.5))
        outer = max(place - 1, 0)
        return cls(statistics.median(ratios), ratios[outer], ratios[-1 - outer], len(ratios))


@dataclass
class Timed:
    """Seconds of a step by variant, load and round; and bytes of the weights."""

    seconds: dict[Pair, dict[str, list[float]]] = field(default_factory=dict)
    bytes: dict[Pair, int] = field(default_factory=dict)

    @classmethod
    def of(cls, rounds: Iterable[dict[str, Any]], bytes_of: dict[Pair, int]) -> Timed:
        """From the rounds as they are stored."""
        found = cls(bytes=dict(bytes_of))
        for each in rounds:
            for name, loads in each["seconds"]:
                by_load = found.seconds.setdefault(tuple(name), {load: [] for load in STEPS})
                for load, took in loads.items():
                    by_load[load].append(took)
        return found

    def ratio(self, first: Pair, other: Pair, load: str) -> Speed:
        """Speed of the other over the first's."""
        return Speed.of(self.seconds[first][load], self.seconds[other][load])

    def row(self, pair: Pair) -> dict[str, Any]:
        """As the results hold it."""
        loads, full = self.seconds[pair], ("full", "100%")
        return {
            "bytes": self.bytes[pair],
            "step_ms": {load: 1e3 * statistics.median(t) for load, t in loads.items()},
            "speed": {load: asdict(self.ratio(full, pair, load)) for load in loads},
        }


def read_prompts(documents: Sequence[Document], tokenizer: Any, count: int) -> list[list[int]]:
    """`count` times PROMPT_TOKENS ids: the starts of documents that are long enough, over again."""
    starts = []
    for document in documents:
        ids = tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= PROMPT_TOKENS:
            starts.append(ids[:PROMPT_TOKENS])
    return [starts[n % len(starts)] for n in range(count)]


def steps_of(full: Variant, ids_SN: torch.Tensor) -> Steps:
    """What each load's step computes: its tokens, and what is cached of the requests' prompts."""
    steps: Steps = {PROMPT: (ids_SN[:PROMPTS], None)}
    return steps | {str(load): _behind(full, ids_SN[:load]) for load in LOADS}


def time_rounds(
    variants: Sequence[Variant],
    steps: Callable[[], Steps],
    folder: RunFolder,
    rounds: int,
    minutes: float,
) -> list[dict[str, Any]]:
    """The stored rounds, and more until there are so many, or for so long; each is stored.

    A round that would end after `minutes` is not begun, judged by the longest so far.
    """
    found: list[dict[str, Any]] = []
    started = time.monotonic()
    longest = 0.0
    with bar("Timing", rounds, "rounds") as advance:
        for number in range(rounds):
            began, name = time.monotonic(), f"round-{number}"
            is_stored = (folder.path / f"{name}.json").exists()
            if not is_stored and began - started + longest >= 60 * minutes:
                break
            compute = partial(_timed_round, variants, steps, number)
            found.append(folder.step(name, compute, timed=True))
            longest = longest if is_stored else max(longest, time.monotonic() - began)
            advance(1)
    return found


def _timed_round(
    variants: Sequence[Variant], steps: Callable[[], Steps], number: int
) -> dict[str, Any]:
    return {"round": number, "seconds": _round(variants, steps(), number)}


def _round(variants: Sequence[Variant], steps: Steps, number: int) -> list[Any]:
    """Seconds of every variant at every load; pairs of a name and loads, as JSON has them."""
    order = random.Random(number)
    found: dict[Pair, dict[str, float]] = {variant.name: {} for variant in variants}
    for load, (ids, cache) in steps.items():
        for variant in order.sample(list(variants), len(variants)):
            found[variant.name][load] = take_step(variant, ids, cache)
    return [[list(name), loads] for name, loads in found.items()]


@torch.inference_mode()
def _behind(full: Variant, ids_SN: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """The next token of each request, and what is cached of its prompt."""
    cache = DynamicCache(config=full.model.config)
    done = full.model(input_ids=ids_SN, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return done.logits[:, -1].argmax(-1, keepdim=True), cache


@torch.inference_mode()
def take_step(variant: Variant, ids: torch.Tensor, cache: Any) -> float:
    """Seconds of the second of two steps; what they cache is forgotten again."""
    with apply(variant.model, variant.plan, experts="leanmoe"):
        _step(variant.model, ids, cache)
        return _step(variant.model, ids, cache)


def _step(model: Any, ids: torch.Tensor, cache: Any) -> float:
    started = time.perf_counter()
    model(input_ids=ids, past_key_values=cache, use_cache=cache is not None, logits_to_keep=1)
    took = time.perf_counter() - started
    if cache is not None:
        cache.crop(-1)
    return took


def weight_bytes(model: Any) -> int:
    """Of all parameters, as they are in memory."""
    return sum(p.numel() * p.element_size() for p in model.parameters())
