"""How far weights are normalised over the experts that are left, chosen by loss.

The loss is that of calibration text: neither end is right for every model, and a layer's output
error ranks them wrongly (docs/concepts/plan.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from leanmoe.plan import Plan, Rule
from leanmoe.results.tune import Phase
from leanmoe.stats.losses import Losses
from leanmoe.tune.context import RENORMALISE, TuneContext, digest

ENDS_AND_MIDDLE = (0.0, 0.5, 1.0)
STEP = 0.25
"""How far a run of layers may go from the value of all."""
SURE = 2.0
"""Standard errors by which another value must lose less to be taken in some layers alone."""
SHARE_LEFT = 0.75
"""Of a token's experts, in the rules that the values are tried on."""


def best_value(measure: Callable[[float], float]) -> float:
    """The value of least loss among the ends, the middle, and one between the best two of these."""
    losses = {a: measure(a) for a in ENDS_AND_MIDDLE}
    best = min(losses, key=losses.__getitem__)
    beside = min((a for a in losses if abs(a - best) == 0.5), key=losses.__getitem__)
    between = (best + beside) / 2
    losses[between] = measure(between)
    return min(losses, key=losses.__getitem__)


def chosen(context: TuneContext, phase: Phase, decode_batch: int) -> float:
    """What the rules for a phase and a decode batch start from: 1 where it has no effect.

    Tried on one rule for all layers: three quarters of a token's experts or, where tokens share
    experts, half of them guaranteed.
    """
    if not context.shape.router.normalises:
        return 1.0
    top_k = context.fingerprint.top_k
    rule = Rule(top_k=max(1, int(SHARE_LEFT * top_k)))
    if phase == "decode" and decode_batch > 1:
        rule = Rule(guaranteed=max(1, top_k // 2))

    def measure(a: float) -> float:
        rules = (replace(rule, renormalise=a),) * context.fingerprint.moe_layers
        bands = Plan.per_layer(context.fingerprint, rules).bands
        plan = Plan.banded(context.fingerprint, bands, context.no_rules)
        if phase == "prompt":
            plan = Plan.banded(context.fingerprint, prompt=rules)
        return _losses(context, plan, decode_batch).mean

    compute = partial(best_value, measure)
    return context.take(RENORMALISE, float, compute, phase, decode_batch)


def by_layer(
    rules: tuple[Rule, ...], measure: Callable[[tuple[Rule, ...]], Losses]
) -> tuple[Rule, ...]:
    """The rules with another value in those runs of layers where that surely loses less.

    Halves of the depth are tried first, and halves of these only where it paid: few passes where
    the layers are alike.
    """
    best, least = rules, measure(rules)
    runs = _halves([n for n, rule in enumerate(rules) if not rule.is_empty and rule.top_k != 0])
    while runs:
        run = runs.pop(0)
        for step in (-STEP, STEP):
            tried = _moved(best, run, step)
            if tried != best and _surely_less(seen := measure(tried), least):
                best, least = tried, seen
                runs += _halves(run)
                break
    return best


def refined(
    context: TuneContext, prompt: tuple[Rule, ...], decode: tuple[Rule, ...], decode_batch: int
) -> tuple[Rule, ...]:
    """`by_layer` of decode rules beside these prompt rules, stored with the run."""
    if not context.shape.router.normalises or all(rule.is_empty for rule in decode):
        return decode

    def measure(rules: tuple[Rule, ...]) -> Losses:
        bands = Plan.per_layer(context.fingerprint, rules).bands
        return _losses(context, Plan.banded(context.fingerprint, bands, prompt), decode_batch)

    def compute() -> tuple[Rule, ...]:
        return by_layer(decode, measure)

    about = (decode_batch, digest([*decode, *prompt]))
    return context.take(RENORMALISE, tuple[Rule, ...], compute, *about)


def with_values_of(rules: Sequence[Rule], others: Sequence[Rule]) -> tuple[Rule, ...]:
    """The rules with `renormalise` of the others, layer by layer, where both do something."""
    return tuple(
        rule if rule.is_empty or other.is_empty else replace(rule, renormalise=other.renormalise)
        for rule, other in zip(rules, others, strict=True)
    )


def _losses(context: TuneContext, plan: Plan, decode_batch: int) -> Losses:
    return context.losses(context.text.searched, plan, decode_batch, "Weights that are left")


def _halves(run: list[int]) -> list[list[int]]:
    middle = len(run) // 2
    return [run[:middle], run[middle:]] if middle else []


def _moved(rules: tuple[Rule, ...], run: Sequence[int], step: float) -> tuple[Rule, ...]:
    return tuple(
        replace(rule, renormalise=min(max(rule.renormalise + step, 0.0), 1.0)) if n in run else rule
        for n, rule in enumerate(rules)
    )


def _surely_less(seen: Losses, least: Losses) -> bool:
    """Whether the sum over sources differs by more than their scatter."""
    change_U = np.bincount(seen.units(), seen.loss_U - least.loss_U)
    return bool(change_U.sum() < -SURE * np.sqrt(np.square(change_U).sum()))
