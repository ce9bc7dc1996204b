"""The load in this process: full model and plans alternate on one loaded model."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from leanmoe.bench.continuous import Arrivals, Room, run, served
from leanmoe.bench.measurement import Measurement, Request
from leanmoe.bench.prompts import Supply
from leanmoe.bench.settings import BenchSettings, ServiceLoad
from leanmoe.bench.sweep import Outcome, Record, RunOne, Sweep, plan_sha256
from leanmoe.core.errors import LeanMoeError
from leanmoe.core.intervals import PairedRatio, RatioOfRuns, ReplyLengths
from leanmoe.plan import Plan, Rule
from leanmoe.runtime import apply, served_experts, shape_of
from leanmoe.scoring.rows import ScoringSetup
from leanmoe.scoring.writing import end_tokens, write_on
from leanmoe.stats.paired import fewest_documents
from leanmoe.stats.reply_lengths import compare_lengths, finished_length, per_finished_request
from leanmoe.stats.runs import Looks, Ratio

FULL = "full"
WATCHED_OUTPUT = 8
"""Tokens of each reply while the router is watched, after what is timed."""


@dataclass(frozen=True)
class Comparison:
    """One load on several variants, each with its runs by repeat; the first is compared with."""

    load: ServiceLoad
    runs: Mapping[str, Mapping[int, Measurement]]
    looks: Looks
    notes: tuple[str, ...]

    def ratio(self, name: str) -> Ratio:
        """Output throughput of variant `name` over the first variant's."""
        first = next(iter(self.runs.values()))
        both = sorted(first.keys() & self.runs[name].keys())
        return self.looks.ratio(
            [first[repeat].output_throughput for repeat in both],
            [self.runs[name][repeat].output_throughput for repeat in both],
        )

    def to_json(self, name: str) -> dict[str, Any]:
        """Each variant's run of median throughput, the throughputs of all, and `name`'s ratio."""
        found = {}
        for variant, runs in self.runs.items():
            ordered = sorted(runs.values(), key=lambda run: run.output_throughput)
            throughputs = [runs[repeat].output_throughput for repeat in sorted(runs)]
            found[variant] = {**ordered[len(ordered) // 2].to_json(), "runs": throughputs}
        return {
            "variants": found,
            "ratio": self.ratio(name).to_json(),
            "requests": self.load.requests,
            "label": "measured",
            "notes": list(self.notes),
        }


def compare_plans(
    model: Any, plans: Mapping[str, Plan], settings: BenchSettings, stream: Sequence[int]
) -> Comparison:
    """Full model and plans in turn at the one load of `settings`, on prompts cut from `stream`.

    Raises LeanMoeError when the model cannot be served this way, or a request fails.
    """
    (load,) = settings.loads()
    supply = Supply(stream, settings.input_len, settings.output_len, seed=settings.seed)
    runner = InProcess(model, settings.targets[0], plans, settings, supply)
    record = Record(None, settings, runner.variants(), {})
    Sweep(runner, supply, settings, record, random.Random(settings.seed)).one_load(load)
    return Comparison(load, record.runs(load), settings.looks, tuple(record.notes))


class InProcess:
    """Runs loads through Transformers' continuous batching under each plan."""

    restarts = False

    def __init__(
        self,
        model: Any,
        name: str,
        plans: Mapping[str, Plan],
        settings: BenchSettings,
        supply: Supply,
    ) -> None:
        """`plans` by variant name; the full model stands before them, stock experts after them.

        Raises LeanMoeError when a plan is for another model or a request does not fit it.
        """
        self._model, self._name = model, name
        self._settings, self._supply = settings, supply
        fingerprint = shape_of(model).fingerprint()
        for plan_name, plan in plans.items():
            try:
                plan.check(fingerprint)
            except LeanMoeError as error:
                raise LeanMoeError(f"plan {plan_name}: {error}") from error
        self._plans = {FULL: Plan(fingerprint), **plans}
        experts = served_experts(model)
        self._experts = dict.fromkeys(self._plans, experts)
        self.beside: frozenset[str] = frozenset()
        if settings.stock and experts != "stock":
            stock = f"transformers {model.config._experts_implementation}"
            self._plans[stock], self._experts[stock] = Plan(fingerprint), "stock"
            self.beside = frozenset({stock})
        self._check_lengths()
        self._manager: Any = None

    def _check_lengths(self) -> None:
        most = getattr(self._model.config, "max_position_embeddings", None)
        if most is not None and self._supply.longest > most:
            raise LeanMoeError(
                f"prompt and reply have up to {self._supply.longest:,} tokens: "
                f"{self._name} takes at most {most:,}; set --input-len and --output-len"
            )

    def describe(self) -> dict[str, Any]:
        """The engine, the model and what computes it."""
        import transformers

        device = self._model.device.type
        return {
            "engine": f"transformers {transformers.__version__} continuous batching, in process",
            "devices": {"kind": "GPU" if device == "cuda" else device.upper(), "count": 1},
            "model": {
                "name": self._name,
                "fingerprint": vars(shape_of(self._model).fingerprint()),
                "dtype": str(self._model.dtype).removeprefix("torch."),
            },
        }

    def variants(self) -> list[dict[str, Any]]:
        """Each variant with its plan's digest and the implementation that computes its experts."""
        found = []
        for name, plan in self._plans.items():
            with self._applied(name) as applied:
                implementation = applied.implementation
            found.append(
                {
                    "name": name,
                    "plan": None if plan.is_empty else plan.to_json(),
                    "plan_sha256": plan_sha256(plan),
                    "experts_implementation": implementation,
                }
            )
        return found

    @contextmanager
    def at(self, load: ServiceLoad) -> Iterator[RunOne]:
        """A service whose cache fits the load."""
        decode_batch = load.concurrency or min(self._settings.max_concurrency, load.requests)
        room = Room(decode_batch, self._supply.longest_prompt, self._supply.longest)
        require_memory(self._model, room)
        with served(self._model, room, self._supply.longest) as self._manager:
            yield self._run_one

    def close(self) -> None:
        """Nothing is left running."""

    def _run_one(
        self, name: str, load: ServiceLoad, requests: Sequence[Request], seed: str
    ) -> Outcome:
        if load.rate is None:
            arrivals = Arrivals(load.concurrency or len(requests))
        else:
            arrivals = Arrivals.poisson(load.rate, len(requests), seed)
        with self._applied(name):
            timelines = run(self._manager, requests, arrivals, self._settings.max_seconds)
        return Outcome(timelines)

    def routing(self, load: ServiceLoad, run_one: RunOne) -> dict[str, Any]:
        """Experts a token used and distinct experts of a step, means over layers and steps.

        Of the tokens that decode: under every variant prompt tokens are counted apart.
        """
        del run_one
        decode_batch = min(load.concurrency or self._settings.max_concurrency, load.requests)
        requests = [
            Request(r.prompt, min(r.output_tokens, WATCHED_OUTPUT))
            for r in self._supply.draw(load, "watched", decode_batch)
        ]
        found = {}
        for name in self._plans:
            watched = _with_prompt_apart(self._plans[name])
            with apply(self._model, watched, experts=self._experts[name], count=True) as applied:
                run(self._manager, requests, Arrivals(decode_batch), self._settings.max_seconds)
            layers = applied.generated
            found[name] = {
                "experts_a_token": sum(c.slots_per_token for c in layers) / len(layers),
                "distinct_experts_a_step": sum(c.distinct_per_step for c in layers) / len(layers),
                "label": "measured",
            }
        return found

    def _applied(self, name: str) -> AbstractContextManager[Any]:
        return apply(self._model, self._plans[name], experts=self._experts[name])


def _with_prompt_apart(plan: Plan) -> Plan:
    """The plan with rules for prompt tokens that change nothing, if it has none of its own."""
    nothing = Rule(top_k=plan.model.top_k)
    return plan.with_level(prompt=plan.prompt or (nothing,) * plan.model.moe_layers)


def require_memory(model: Any, room: Room) -> None:
    """Refuses a load whose cache cannot fit, before it is allocated."""
    needed = cache_bytes(model, room)
    if model.device.type == "cuda":
        free = int(torch.cuda.mem_get_info()[0])
    else:
        import psutil

        free = int(psutil.virtual_memory().available)
    if needed > free:
        raise LeanMoeError(
            f"{room.decode_batch} requests of {room.longest:,} tokens need {needed / 1e9:.1f} GB "
            f"for keys and values: {free / 1e9:.1f} GB are free; lower the load or the lengths"
        )


def cache_bytes(model: Any, room: Room) -> int:
    """Keys and values of all layers for the pages of `room`."""
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "qk_head_dim", None) or getattr(config, "head_dim", None)
    width = width or config.hidden_size // config.num_attention_heads
    slots = (room.decode_batch + 4) * room.page
    size = torch.empty((), dtype=model.dtype).element_size()
    return int(2 * slots * config.num_hidden_layers * heads * width * size)


NO_END = 0
"""The length of a reply that did not end by itself."""


@dataclass(frozen=True)
class ReplyWriter:
    """Do replies get longer? Full model and plans reply to the same prompts, greedily.

    Steps stay as full as the load says: a reply that has ended is written on, as the next request
    would be in a service.
    """

    model: Any
    prompts: Sequence[Sequence[int]]
    most: int
    """Tokens at which a reply is cut."""
    confidence: float
    seed: int

    def lengths(self, plan: Plan, load: int, what: str) -> tuple[int, ...]:
        """Tokens of each reply with its end token; `NO_END` where it was cut."""
        setup, ends = ScoringSetup.of(self.model, plan, load, self.seed), end_tokens(self.model)
        replies = write_on(setup, self.prompts, self.most, what, ends=ends)
        return tuple(finished_length(reply, ends) or NO_END for reply in replies)

    def compare(self, full: Sequence[int], write: Callable[[], Sequence[int]]) -> ReplyLengths:
        """The lengths of the full model's replies beside those that `write` gives of a plan.

        Where too few of the full model's end for an interval, the plan writes none.
        """
        ended = len(full) - full.count(NO_END)
        if ended < fewest_documents(self.confidence):
            return ReplyLengths(len(full), self.most, ended, None, 0, None)
        first, second = ([length or None for length in each] for each in (full, write()))
        return compare_lengths(first, [second], self.most, self.confidence, self.seed)


def gain_per_request(gain: RatioOfRuns, replies: ReplyLengths) -> PairedRatio | None:
    """The gain per finished request; None where too few replies end."""
    return None if replies.ratio is None else per_finished_request(gain, replies.ratio)
