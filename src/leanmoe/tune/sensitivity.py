"""The rules worth trying in one layer, few enough that each can be measured.

What each layer loses under each candidate rule: one layer changed at a time.

The hidden states before the changed layer are those of the full model, so they are computed once
and every candidate runs from its own layer on.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from leanmoe.core.progress import bar
from leanmoe.models.routers import Router
from leanmoe.plan import Fingerprint, Plan, Rule
from leanmoe.runtime import IMPLEMENTATION, apply, find_layers, resume_from
from leanmoe.runtime.model import (
    keep_hidden,
)
from leanmoe.scoring.divergence import Reference, reference
from leanmoe.scoring.forward import final_hidden
from leanmoe.scoring.windows import WindowBatch, Windows
from leanmoe.stats.paired import (
    Divergence,
)

Phase = Literal["prompt", "decode"]


@dataclass(frozen=True)
class Candidate:
    """A rule in one MoE layer, for prompt tokens or for tokens that decode together."""

    phase: Phase
    layer: int
    rule: Rule
    decode_batch: int = 1
    """Requests that decode together; 1 for rules that do not depend on company."""

    def plan(self, model: Fingerprint) -> Plan:
        """The plan that changes this layer alone."""
        rules = [Rule()] * model.moe_layers
        rules[self.layer] = self.rule
        if self.phase == "prompt":
            return Plan(model, prompt=tuple(rules))
        return Plan.per_layer(model, tuple(rules))

    def to_json(self) -> dict[str, Any]:
        """The candidate as JSON values."""
        return {
            "phase": self.phase,
            "layer": self.layer,
            "rule": self.rule.to_json(),
            "together": self.decode_batch,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Candidate:
        """Reads what `to_json` wrote."""
        return cls(value["phase"], value["layer"], Rule.from_json(value["rule"]), value["together"])


def prompt_rules(top_k: int, keep: bool | None = None) -> tuple[Rule, ...]:
    """Fewer experts for prompt tokens, down to none: the last layer's feed nothing that is read."""
    steps = sorted({0, 1, 2, 3, top_k // 2, (3 * top_k) // 4}, reverse=True)
    fewer = tuple(Rule(top_k=k, keep_weights=keep if k else None) for k in steps if k < top_k)
    return (*fewer, *(Rule(threshold=share, keep_weights=keep) for share in (0.5, 0.7)))


def own_rules(top_k: int, keep: bool | None = None) -> tuple[Rule, ...]:
    """Rules in which a token looks at its own gates only."""
    counts = range(top_k - 1, max(5 * top_k // 8, 1) - 1, -1)
    fewer = tuple(Rule(top_k=k, keep_weights=keep) for k in counts)
    gated = tuple(Rule(threshold=share, keep_weights=keep) for share in (0.15, 0.25))
    mass = tuple(Rule(top_p=share, keep_weights=keep) for share in (0.95, 0.9))
    return (*fewer, *gated, *mass)


def batch_aware_rules(
    top_k: int, experts: int, decode_batch: int, keep: bool | None = None
) -> tuple[Rule, ...]:
    """Rules in which the tokens of a step share experts; none for a token on its own."""
    if decode_batch < 2:
        return ()
    counts = range(top_k - 3, max(top_k // 4, 0), -1)
    kept = tuple(Rule(guaranteed=k, keep_weights=keep) for k in counts)
    expected = experts * (1 - (1 - top_k / experts) ** decode_batch)
    budgets = sorted({max(1, round(expected * share)) for share in (0.8, 0.65)}, reverse=True)
    return (*kept, *(Rule(budget=budget, keep_weights=keep) for budget in budgets))


def candidates(
    model: Fingerprint, loads: tuple[int, ...], router: Router | None = None
) -> tuple[Candidate, ...]:
    """Every candidate of a run, those that serve several loads once.

    Where `router` normalises the weights of those it picks, the rules keep the weights of the
    whole top-k: normalising anew over fewer loses several times as much (docs/quality.md).
    """
    layers = range(model.moe_layers)
    keep = True if router is not None and normalises(router) else None
    prompt = [Candidate("prompt", n, r) for n in layers for r in prompt_rules(model.top_k, keep)]
    own = [Candidate("decode", n, r) for n in layers for r in own_rules(model.top_k, keep)]
    shared = [
        Candidate("decode", n, rule, decode_batch)
        for decode_batch in loads
        for n in layers
        for rule in batch_aware_rules(model.top_k, model.experts, decode_batch, keep)
    ]
    return (*prompt, *own, *shared)


def normalises(router: Router) -> bool:
    """Whether what an expert weighs depends on which others are picked beside it."""
    return router.normalise or router.scoring == "softmax_after_top_k"


BATCH_TOKENS = 8192


@dataclass(frozen=True)
class Sensitivity:
    """What a candidate costs in next-token prediction, and what it activates."""

    candidate: Candidate
    divergence: float
    """KL from the full model, nats per predicted token."""
    loss_difference: float
    """Next-token loss over the full model's, nats per predicted token."""
    slots: float
    """Mean experts a token of the candidate's phase uses in its layer."""
    distinct: float
    """Mean distinct experts a step of the candidate's phase wakes in its layer."""

    def to_json(self) -> dict[str, Any]:
        """The measurement as JSON values."""
        return {
            **self.candidate.to_json(),
            "divergence": self.divergence,
            "loss_difference": self.loss_difference,
            "slots": self.slots,
            "distinct": self.distinct,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Sensitivity:
        """Reads what `to_json` wrote."""
        names = ("divergence", "loss_difference", "slots", "distinct")
        return cls(Candidate.from_json(value), *(float(value[name]) for name in names))


LEAST_RATE = 0.1
"""Nats of loss for a nat of divergence, at least: no rule is taken to be free."""


def loss_rates(sensitivities: Sequence[Sensitivity]) -> dict[tuple[Phase, int], float]:
    """Nats of next-token loss that a nat of divergence comes to, by phase and layer.

    Divergence is far less noisy than loss over few tokens and ranks the rules of a layer; but it
    also counts changes that do the loss no harm, and in some layers it counts little else. The
    median ratio over a layer's candidates puts its divergences in the unit of the margin.
    """
    ratios: dict[tuple[Phase, int], list[float]] = {}
    for found in sensitivities:
        where = (found.candidate.phase, found.candidate.layer)
        known = ratios.setdefault(where, [])
        if found.divergence > 0:
            known.append(found.loss_difference / found.divergence)
    return {
        where: max(statistics.median(found), LEAST_RATE) if found else 1.0
        for where, found in ratios.items()
    }


def measure(
    model: Any,
    windows: Windows,
    tried: Sequence[Candidate],
    fingerprint: Fingerprint,
    what: str = "Sensitivity",
) -> list[Sensitivity]:
    """Measures every candidate on the windows' tokens after their prompt.

    Candidates of one `decode_batch` share their batches; see `candidates.candidates`.
    """
    against = reference(model, windows, BATCH_TOKENS)
    found: dict[Candidate, Sensitivity] = {}
    with bar(what, len(tried) * windows.tokens, "tokens") as advance:
        for decode_batch in sorted({candidate.decode_batch for candidate in tried}):
            group = [c for c in tried if c.decode_batch == decode_batch]
            for result in _group(model, against, group, fingerprint, decode_batch, advance):
                found[result.candidate] = result
    return [found[candidate] for candidate in tried]


@torch.inference_mode()
def _group(
    model: Any,
    against: Reference,
    group: Sequence[Candidate],
    fingerprint: Fingerprint,
    decode_batch: int,
    advance: Any,
) -> Iterable[Sensitivity]:
    layers = find_layers(model)
    sums: dict[Candidate, list[Divergence]] = {candidate: [] for candidate in group}
    counted: dict[Candidate, list[tuple[int, int, float, int]]] = {c: [] for c in group}
    for batch in against.windows.batches(BATCH_TOKENS, decode_batch):
        with keep_hidden(model, [layer.decoder_index for layer in layers]) as kept:
            final_hidden(model, batch)
        hidden = dict(kept)
        for candidate in group:
            index = layers[candidate.layer].decoder_index
            with (
                resume_from(model, index, hidden[index]),
                apply(
                    model,
                    candidate.plan(fingerprint),
                    experts=IMPLEMENTATION,
                    decode_batch=decode_batch,
                    prompt_tokens=batch.prompt_in_call,
                    count=True,
                ) as applied,
            ):
                final = final_hidden(model, batch)
            sums[candidate].append(against.compare(batch, final))
            counts = applied.prompt if candidate.phase == "prompt" else applied.generated
            layer = counts[candidate.layer]
            counted[candidate].append((layer.tokens, layer.slots, layer.distinct, layer.steps))
            advance(_tokens(batch))
    for candidate in group:
        first, *others = sums[candidate]
        total = sum(others, start=first)
        tokens, slots, distinct, steps = (
            sum(part) for part in zip(*counted[candidate], strict=True)
        )
        yield Sensitivity(
            candidate,
            total.mean_kl,
            total.loss_difference,
            slots / max(tokens, 1),
            distinct / max(steps, 1),
        )


def _tokens(batch: WindowBatch) -> int:
    return batch.tokens
