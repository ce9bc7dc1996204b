"""What each MoE layer loses under each rule worth trying, and how long its experts take.

Losses: one layer is changed at a time. The hidden states before it are those of the full model, so
they are computed once and every candidate runs from its own layer on.

Times: real routing (a profile's trace) goes through each rule and the experts function that serving
uses. A line through those times, in rows and distinct experts, smooths the noise.

Letters: T tokens, E experts, D hidden width.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from leanmoe.bench.continuous import PREFILL_TOKENS_A_STEP
from leanmoe.core.progress import Advance, bar
from leanmoe.kernels.dispatch import fast_route
from leanmoe.plan import Fingerprint, Rule
from leanmoe.profile.record import draw_steps
from leanmoe.profile.saved import Profile
from leanmoe.results.tune import Candidate, Phase, Sensitivity
from leanmoe.routing import count_distinct, count_slots
from leanmoe.runtime import IMPLEMENTATION, apply, find_layers, resume_from
from leanmoe.runtime.model import keep_hidden
from leanmoe.scoring.divergence import CachedPrompts, Reference, final_hidden
from leanmoe.scoring.windows import WindowBatch
from leanmoe.stats.losses import Divergence
from leanmoe.tune.context import BATCH_TOKENS, LAYER_TIMES, SENSITIVITY, TuneContext
from leanmoe.tune.renormalise import chosen


def prompt_rules(top_k: int, a: float = 1.0) -> tuple[Rule, ...]:
    """Fewer experts for prompt tokens, down to none: the last layer's feed nothing that is read."""
    steps = sorted({0, 1, 2, 3, top_k // 2, (3 * top_k) // 4}, reverse=True)
    fewer = tuple(Rule(top_k=k, renormalise=a if k else 1.0) for k in steps if k < top_k)
    return (*fewer, *(Rule(threshold=share, renormalise=a) for share in (0.5, 0.7)))


def per_token_rules(top_k: int, a: float = 1.0) -> tuple[Rule, ...]:
    """Rules by which a token looks at its own gates only."""
    counts = range(top_k - 1, max(5 * top_k // 8, 1) - 1, -1)
    fewer = tuple(Rule(top_k=k, renormalise=a) for k in counts)
    gated = tuple(Rule(threshold=share, renormalise=a) for share in (0.15, 0.25))
    mass = tuple(Rule(top_p=share, renormalise=a) for share in (0.95, 0.9))
    return (*fewer, *gated, *mass)


def batch_aware_rules(
    top_k: int, experts: int, decode_batch: int, a: float = 1.0
) -> tuple[Rule, ...]:
    """Rules by which the tokens of a step share experts; none for a token on its own."""
    if decode_batch < 2:
        return ()
    counts = range(top_k - 3, max(top_k // 4, 0), -1)
    kept = tuple(Rule(guaranteed=k, renormalise=a) for k in counts)
    expected = experts * (1 - (1 - top_k / experts) ** decode_batch)
    budgets = sorted({max(1, round(expected * share)) for share in (0.8, 0.65)}, reverse=True)
    return (*kept, *(Rule(budget=budget, renormalise=a) for budget in budgets))


def candidates(
    model: Fingerprint, concurrency: tuple[int, ...], value: Callable[[Phase, int], float]
) -> tuple[Candidate, ...]:
    """Every candidate of a run; those that serve at several concurrencies stand once.

    `value` says from which `renormalise` the rules of a phase and a decode batch start.
    """
    layers, top_k = range(model.moe_layers), model.top_k
    prompts = prompt_rules(top_k, value("prompt", 1))
    alone = per_token_rules(top_k, value("decode", 1))
    prompt = [Candidate("prompt", n, rule, 1) for n in layers for rule in prompts]
    own = [Candidate("decode", n, rule, 1) for n in layers for rule in alone]
    shared = [
        Candidate("decode", n, rule, decode_batch)
        for decode_batch in concurrency
        for a in (value("decode", decode_batch),)
        for n in layers
        for rule in batch_aware_rules(top_k, model.experts, decode_batch, a)
    ]
    return (*prompt, *own, *shared)


LEAST_RATE = 0.1
"""Nats of loss for a nat of divergence, at least: no rule is taken to be free."""


def loss_rates(sensitivities: Sequence[Sensitivity]) -> dict[tuple[Phase, int], float]:
    """Nats of next-token loss that a nat of divergence comes to, by phase and layer.

    Divergence is far less noisy than loss over few tokens and ranks the rules of a layer; but it
    also counts changes that do the loss no harm, and in some layers it counts little else. The
    median ratio over a layer's candidates puts its divergences in the unit of the margin.
    """
    ratios: dict[tuple[Phase, int], list[float]] = {}
    for measured in sensitivities:
        seen = ratios.setdefault((measured.phase, measured.layer), [])
        if measured.divergence > 0:
            seen.append(measured.loss_difference / measured.divergence)
    return {
        place: max(statistics.median(seen), LEAST_RATE) if seen else 1.0
        for place, seen in ratios.items()
    }


def measure_sensitivities(context: TuneContext) -> list[Sensitivity]:
    """Every candidate on calibration text, stored group by group of phase and decode batch."""
    value = partial(chosen, context)
    tried = candidates(context.fingerprint, context.settings.concurrency, value)
    sensitivities: list[Sensitivity] = []
    for decode_batch, phase in sorted({(c.decode_batch, c.phase) for c in tried}):
        group = [c for c in tried if (c.decode_batch, c.phase) == (decode_batch, phase)]
        what = f"Sensitivity, {phase}, concurrency {decode_batch}"
        compute = partial(_measured, context, group, what)
        kind = tuple[Sensitivity, ...]
        sensitivities += context.take(SENSITIVITY, kind, compute, phase, decode_batch)
    return sensitivities


def _measured(
    context: TuneContext, group: Sequence[Candidate], what: str
) -> tuple[Sensitivity, ...]:
    """Candidates of one phase and one decode batch share their batches of windows."""
    against = context.reference(SENSITIVITY.name, context.text.searched)
    with bar(what, len(group) * context.text.searched.tokens, "tokens") as advance:
        return _measure(context, against, group, advance)


@torch.inference_mode()
def _measure(
    context: TuneContext, against: Reference, group: Sequence[Candidate], advance: Advance
) -> tuple[Sensitivity, ...]:
    model, phase, decode_batch = context.model, group[0].phase, group[0].decode_batch
    sums: dict[Candidate, list[Divergence]] = {candidate: [] for candidate in group}
    counted: dict[Candidate, list[tuple[int, int, float, int]]] = {c: [] for c in group}
    for batch in against.windows.batches(BATCH_TOKENS, decode_batch):
        started = Started.of(context, batch, phase)
        for candidate in group:
            with apply(
                model,
                candidate.plan(context.fingerprint),
                experts=IMPLEMENTATION,
                decode_batch=decode_batch,
                prompt_tokens=started.prompt_tokens,
                count=True,
            ) as applied:
                final = started.final_hidden(model, candidate.layer)
            sums[candidate].append(against.compare(batch, final))
            counts = applied.prompt if phase == "prompt" else applied.generated
            layer = counts[candidate.layer]
            counted[candidate].append((layer.tokens, layer.slots, layer.distinct, layer.steps))
            advance(batch.tokens)
    return tuple(_summed(each, sums[each], counted[each]) for each in group)


@dataclass(frozen=True)
class Started:
    """A batch that the full model has run: what enters each layer, to go on from with a rule.

    A rule for decoding leaves prompts as they are, so replies alone go on, where a batch has any.
    """

    batch: WindowBatch
    hidden: Mapping[int, torch.Tensor]
    """By number of the MoE layer: the hidden states [S,N,D] of those rows that go on."""
    prompts: CachedPrompts | None

    @classmethod
    def of(cls, context: TuneContext, batch: WindowBatch, phase: Phase) -> Started:
        """Runs the batch once under no rule."""
        model, prompts, first = context.model, None, 0
        indices = [layer.decoder_index for layer in find_layers(model)]
        with context.full(), keep_hidden(model, indices) as kept:
            if phase == "decode" and batch.reply_tokens:
                prompts, first = CachedPrompts.of(model, batch), batch.ids_SN.shape[1]
            else:
                final_hidden(model, batch)
        hidden = {number: kept[index][:, first:] for number, index in enumerate(indices)}
        return cls(batch, hidden, prompts)

    @property
    def prompt_tokens(self) -> int:
        """The first tokens of a row of the call that are a prompt: what `apply` takes."""
        return self.batch.prompt_in_call if self.prompts is None else 0

    def final_hidden(self, model: Any, layer: int) -> torch.Tensor:
        """The final hidden states [S,N,D] under what is applied, from this MoE layer on."""
        index = find_layers(model)[layer].decoder_index
        with resume_from(model, index, self.hidden[layer]):
            if self.prompts is None:
                return final_hidden(model, self.batch)
            return self.prompts.final_hidden(model)


def _summed(
    candidate: Candidate,
    parts: Sequence[Divergence],
    counted: Sequence[tuple[int, int, float, int]],
) -> Sensitivity:
    total = sum(parts[1:], start=parts[0])
    tokens, slots, distinct, steps = (sum(part) for part in zip(*counted, strict=True))
    return Sensitivity(
        **vars(candidate),
        divergence=total.mean_kl,
        loss_difference=total.loss_difference,
        slots=slots / max(tokens, 1),
        distinct=distinct / max(steps, 1),
    )


REPEATS = 12
STEPS = 4


@dataclass(frozen=True)
class LayerTime:
    """t = base + a x distinct experts + b x rows, in seconds for one layer in one step."""

    base: float
    per_distinct: float
    per_row: float
    routing: float
    """What choosing by a rule adds, for layers that have one."""
    error: float
    """Mean relative error of the line on the steps it was fitted to."""

    def seconds(self, rows: float, distinct: float, has_rule: bool) -> float:
        """Time of one layer in one step."""
        return (
            self.base
            + self.per_distinct * distinct
            + self.per_row * rows
            + (self.routing if has_rule else 0.0)
        )


PhaseTimes = Mapping[Phase, LayerTime]


def time_layers(context: TuneContext) -> dict[int, PhaseTimes]:
    """Layer times by concurrency, for its prompt steps and for its decode steps."""
    top_k = context.shape.top_k
    counts = (max(1, top_k // 2), max(1, top_k // 4))
    fewer = [Rule(), *(Rule(top_k=k) for k in set(counts))]

    def line(phase: Phase, tokens: int, rules: Sequence[Rule]) -> LayerTime:
        compute = partial(fit, context.model, context.profile, tokens, rules, context.settings.seed)
        return context.take(LAYER_TIMES, LayerTime, compute, phase, tokens)

    prefill = line("prompt", prefill_step(context.profile), fewer)
    shared = [Rule(guaranteed=k) for k in counts]
    return {
        decode_batch: {
            "prompt": prefill,
            "decode": line("decode", decode_batch, fewer if decode_batch == 1 else fewer + shared),
        }
        for decode_batch in context.settings.concurrency
    }


def prefill_step(profile: Profile) -> int:
    """Tokens of the prefill steps that are timed: those of service, as far as the trace goes."""
    return min(PREFILL_TOKENS_A_STEP, profile.trace.tokens)


@torch.inference_mode()
def fit(
    model: Any, profile: Profile, tokens: int, rules: Sequence[Rule], seed: int = 0
) -> LayerTime:
    """Times steps of `tokens` tokens under `rules` in interleaved order and fits the line."""
    layer = find_layers(model)[profile.model.moe_layers // 2]
    number = layer.number
    logits_TE = torch.from_numpy(profile.trace.logits_LTE[number])
    bias_E = None if profile.bias_LE is None else torch.from_numpy(profile.bias_LE[number])
    hidden_TD = layer.random_input(tokens, torch.Generator().manual_seed(seed))
    steps = draw_steps(profile.trace, tokens, STEPS, seed)
    times: dict[tuple[int, int], list[float]] = {}
    routing_times: dict[tuple[int, int], list[float]] = {}
    work: dict[tuple[int, int], tuple[float, float]] = {}
    cases = [(r, s) for r in range(len(rules)) for s in range(STEPS)]
    order = random.Random(seed)
    for _ in range(REPEATS):
        order.shuffle(cases)
        for case in cases:
            rule, step = rules[case[0]], steps[case[1]]
            logits = logits_TE[step].float().to(hidden_TD.device)
            started = time.perf_counter()
            routing = fast_route(logits, profile.router, profile.model.top_k, rule, bias_E)
            routed = time.perf_counter()
            layer.run_experts(hidden_TD, routing.ids_BTK, routing.weights_BTK)
            ended = time.perf_counter()
            times.setdefault(case, []).append(ended - routed)
            routing_times.setdefault(case, []).append(routed - started)
            work[case] = (
                float(count_slots(routing.ids_BTK, profile.model.experts)),
                float(count_distinct(routing.ids_BTK, profile.model.experts)),
            )
    return _line(times, routing_times, work, rules)


def _line(
    times: dict[tuple[int, int], list[float]],
    routing_times: dict[tuple[int, int], list[float]],
    work: dict[tuple[int, int], tuple[float, float]],
    rules: Sequence[Rule],
) -> LayerTime:
    cases = list(times)
    seen = np.array([statistics.median(times[case]) for case in cases])
    columns = np.array([[1.0, work[case][1], work[case][0]] for case in cases])
    coefficients = _not_negative(columns, seen)
    fitted = columns @ coefficients
    plain = [t for case in cases if rules[case[0]].is_empty for t in routing_times[case]]
    ruled = [t for case in cases if not rules[case[0]].is_empty for t in routing_times[case]]
    routing = statistics.median(ruled) - statistics.median(plain) if ruled and plain else 0.0
    return LayerTime(
        float(coefficients[0]),
        float(coefficients[1]),
        float(coefficients[2]),
        float(max(routing, 0.0)),
        float(np.mean(np.abs(fitted - seen) / seen)),
    )


def _not_negative(columns: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Least squares of relative errors, with no coefficient below zero."""
    from scipy.optimize import nnls

    weighted = columns / seen[:, None]
    scale = weighted.max(axis=0)
    solution, _ = nnls(weighted / scale, np.ones(len(seen)))
    return np.asarray(solution / scale)
