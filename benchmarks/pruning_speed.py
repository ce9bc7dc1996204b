"""How fast are pruned checkpoints, and skipping, at each load, and how large? Used by pruning.py.

Single steps are timed: a decode step of B requests that have 128 tokens each behind them, and a
step with 8 prompts of 128. In each round every variant takes one step, in an order drawn anew;
speed is the full model's time over the variant's in the same round. What is shown is the median
over rounds with the interval of order statistics, which some slow rounds do not move. All variants
attend to what the full model cached: what is in a cache does not change how long it takes.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from scipy import stats
from transformers import DynamicCache

from leanmoe import apply
from leanmoe.job.prune import checkpoint_folder
from leanmoe.plan import Plan
from leanmoe.progress import bar
from leanmoe.prune.checkpoint import read_source, write_pruned
from leanmoe.prune.choose import Kept
from leanmoe.runtime import load_model
from leanmoe.text import Document

PROMPT_TOKENS = 128
PROMPTS = 8
"""In the step of prompts."""
PROMPT = "prompts"
Pair = tuple[str, str]


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


@contextmanager
def loaded(source: str, kept: dict[Pair, Kept]) -> Iterator[dict[Pair, Any]]:
    """The pruned checkpoints, written and loaded as any other."""
    folder = checkpoint_folder(source)
    found = {}
    with tempfile.TemporaryDirectory() as temporary, bar("Pruning", len(kept)) as advance:
        for number, (pair, chosen) in enumerate(kept.items()):
            target = Path(temporary) / str(number)
            write_pruned(read_source(folder), chosen, target, {}, lambda _: None)
            found[pair], _ = load_model(str(target))
            advance(1)
        yield found


def read_prompts(documents: Sequence[Document], tokenizer: Any, count: int) -> torch.Tensor:
    """[count, PROMPT_TOKENS] ids: the starts of documents that are long enough, in turn."""
    starts = []
    for document in documents:
        ids = tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= PROMPT_TOKENS:
            starts.append(ids[:PROMPT_TOKENS])
    return torch.tensor([starts[n % len(starts)] for n in range(count)])


def speeds(
    variants: Sequence[Variant], ids_NL: torch.Tensor, loads: Sequence[int], rounds: int
) -> Timed:
    """Times every variant at every load; the first variant is the full model."""
    timed = Timed()
    order = random.Random(0)
    steps = {PROMPT: (ids_NL[:PROMPTS], None)}
    steps |= {str(load): _behind(variants[0], ids_NL[:load]) for load in loads}
    with bar("Timing", len(variants) * len(steps) * (rounds + 1), "steps") as advance:
        for variant in variants:
            timed.seconds[variant.name] = {load: [] for load in steps}
            timed.bytes[variant.name] = weight_bytes(variant.model)
        for load, (ids, cache) in steps.items():
            for turn in range(rounds + 1):
                for variant in order.sample(list(variants), len(variants)):
                    took = _step(variant, ids, cache)
                    if turn:  # the first warms kernels and memory
                        timed.seconds[variant.name][load].append(took)
                    advance(1)
    return timed


def weight_bytes(model: Any) -> int:
    """Of all parameters, as they are in memory."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


@torch.inference_mode()
def _behind(full: Variant, ids_NL: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """The next token of each request, and what is cached of its prompt."""
    cache = DynamicCache(config=full.model.config)
    done = full.model(input_ids=ids_NL, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return done.logits[:, -1].argmax(-1, keepdim=True), cache


@torch.inference_mode()
def _step(variant: Variant, ids: torch.Tensor, cache: Any) -> float:
    """Seconds of one step; what it caches is forgotten again."""
    model = variant.model
    with apply(model, variant.plan, experts="leanmoe"):
        started = time.perf_counter()
        model(input_ids=ids, past_key_values=cache, use_cache=cache is not None, logits_to_keep=1)
        took = time.perf_counter() - started
    if cache is not None:
        cache.crop(-1)
    return took
