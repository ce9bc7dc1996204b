"""How fast are pruned checkpoints, and skipping, at each load, and how large? Used by pruning.py.

A load of B requests: their prompts run in one step, then replies are written, all B in each step.
Variants take turns in an order drawn anew for each repeat; speed is output tokens over the whole
time, and its ratio to the full model's is paired by repeat.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from leanmoe import apply
from leanmoe.job.prune import checkpoint_folder
from leanmoe.load.metrics import Ratio
from leanmoe.plan import Plan
from leanmoe.progress import bar
from leanmoe.prune.checkpoint import read_source, write_pruned
from leanmoe.prune.choose import Kept
from leanmoe.runtime import load_model
from leanmoe.text import Document

PROMPT_TOKENS = 128
REPLY_TOKENS = 16
Pair = tuple[str, str]


@dataclass(frozen=True)
class Variant:
    """A model and the plan it runs under."""

    name: Pair
    model: Any
    plan: Plan


@dataclass
class Timed:
    """Seconds of prompts and of replies by variant, load and repeat; and bytes of the weights."""

    seconds: dict[Pair, dict[int, list[tuple[float, float]]]] = field(default_factory=dict)
    bytes: dict[Pair, int] = field(default_factory=dict)

    def rates(self, pair: Pair, load: int) -> list[float]:
        """Output tokens a second, by repeat."""
        return [load * REPLY_TOKENS / (a + b) for a, b in self.seconds[pair][load]]

    def median(self, pair: Pair, load: int) -> float:
        """Output tokens a second."""
        return statistics.median(self.rates(pair, load))

    def ratio(self, first: Pair, other: Pair, load: int) -> Ratio:
        """Speed of the other over the first's."""
        return Ratio.of(self.rates(first, load), self.rates(other, load))

    def row(self, pair: Pair) -> dict[str, Any]:
        """As the results hold it."""
        full = ("full", "100%")
        return {
            "bytes": self.bytes[pair],
            "tokens_per_second": {str(b): self.median(pair, b) for b in self.seconds[pair]},
            "prompt_seconds": {
                str(b): statistics.median(a for a, _ in runs)
                for b, runs in self.seconds[pair].items()
            },
            "reply_seconds": {
                str(b): statistics.median(c for _, c in runs)
                for b, runs in self.seconds[pair].items()
            },
            "speed": {str(b): self.ratio(full, pair, b).to_json() for b in self.seconds[pair]},
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
    variants: Sequence[Variant], ids_NL: torch.Tensor, loads: Sequence[int], repeats: int
) -> Timed:
    """Times every variant at every load."""
    timed = Timed()
    order = random.Random(0)
    with bar("Timing", len(variants) * len(loads) * (repeats + 1), "runs") as advance:
        for variant in variants:
            timed.seconds[variant.name] = {load: [] for load in loads}
            timed.bytes[variant.name] = weight_bytes(variant.model)
            for load in loads:  # kernels and memory are warm
                _serve(variant, ids_NL[:load], 2)
                advance(1)
        for load in loads:
            for _ in range(repeats):
                for variant in order.sample(list(variants), len(variants)):
                    found = _serve(variant, ids_NL[:load], REPLY_TOKENS)
                    timed.seconds[variant.name][load].append(found)
                    advance(1)
    return timed


def weight_bytes(model: Any) -> int:
    """Of all parameters, as they are in memory."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


@torch.inference_mode()
def _serve(variant: Variant, ids_NL: torch.Tensor, reply: int) -> tuple[float, float]:
    """Seconds of the prompts and of the replies."""
    model, cache = variant.model, DynamicCache(config=variant.model.config)
    with apply(model, variant.plan, experts="leanmoe"):
        started = time.perf_counter()
        done = model(input_ids=ids_NL, past_key_values=cache, use_cache=True, logits_to_keep=1)
        prompted = time.perf_counter()
        for _ in range(reply - 1):
            ids = done.logits[:, -1].argmax(-1, keepdim=True)
            done = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return prompted - started, time.perf_counter() - prompted
