"""The rules worth trying in one layer, few enough that each can be measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from leanmoe.models.routers import Router
from leanmoe.plan import Fingerprint, Plan, Rule

Phase = Literal["prompt", "decode"]


@dataclass(frozen=True)
class Candidate:
    """A rule in one MoE layer, for prompt tokens or for tokens that decode together."""

    phase: Phase
    layer: int
    rule: Rule
    together: int = 1
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
            "together": self.together,
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


def company_rules(
    top_k: int, experts: int, together: int, keep: bool | None = None
) -> tuple[Rule, ...]:
    """Rules in which the tokens of a step share experts; none for a token on its own."""
    if together < 2:
        return ()
    counts = range(top_k - 3, max(top_k // 4, 0), -1)
    kept = tuple(Rule(guaranteed=k, keep_weights=keep) for k in counts)
    expected = experts * (1 - (1 - top_k / experts) ** together)
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
        Candidate("decode", n, rule, together)
        for together in loads
        for n in layers
        for rule in company_rules(model.top_k, model.experts, together, keep)
    ]
    return (*prompt, *own, *shared)


def normalises(router: Router) -> bool:
    """Whether what an expert weighs depends on which others are picked beside it."""
    return router.normalise or router.scoring == "softmax_after_top_k"
