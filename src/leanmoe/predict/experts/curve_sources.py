"""Where curves of distinct experts come from: assumptions, a saved profile, or replayed traces."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leanmoe.core.errors import LeanMoeError
from leanmoe.core.files import read_json
from leanmoe.core.progress import bar
from leanmoe.core.schema import from_json
from leanmoe.models.shape import MoEShape
from leanmoe.plan import Fingerprint, Plan, Rule
from leanmoe.plan.placement import Placement
from leanmoe.predict.experts.assumed import Assumed, assumed_curve
from leanmoe.predict.experts.curves import Curve, CurveOf, from_points
from leanmoe.predict.experts.spread import ALONE, RankLayout

if TYPE_CHECKING:
    from leanmoe.profile.saved import Profile


CurvesOf = Callable[[RankLayout], CurveOf]
"""The curves by where experts are and whose tokens share them."""


def assumed_curves(model: MoEShape, assumed: Assumed, scope: RankLayout = ALONE) -> CurveOf:
    """Curves where no trace is at hand: the same in every layer."""
    router = model.router

    @cache
    def of_rule(rule: Rule) -> Curve:
        return assumed_curve(
            model.experts, model.top_k, rule, assumed, router.groups, router.groups_used, scope
        )

    return lambda _layer, rule: of_rule(rule)


def saved_curves(saved: Mapping[str, Any], model: MoEShape) -> CurveOf:
    """Curves of `profile.json` (its `distinct`), which holds the full model's; needs no torch.

    A rule that lowers `top_k` alone scales every expert's use; any other rule needs its traces
    replayed (`leanmoe predict --profile` does that where torch is installed). Raises LeanMoeError
    for a profile of another model.
    """
    mine = model.fingerprint()
    theirs = from_json(Fingerprint, saved.get("model"), "the profile's model")
    if theirs.difference(mine) is not None:
        raise LeanMoeError(f"the profile is of another model: {theirs}, this one is {mine}")
    layers = _saved_points(saved, model)

    @cache
    def curve_of(layer: int, rule: Rule) -> Curve:
        return _saved_curve(layers[layer], rule, model)

    return curve_of


def _saved_points(saved: Mapping[str, Any], model: MoEShape) -> list[list[tuple[float, float]]]:
    """By layer: tokens of a step and the distinct experts that were counted with so many."""
    try:
        layers = [
            [(float(point["tokens"]), float(point["measured"])) for point in layer["distinct"]]
            for layer in saved["profile"]["layers"]
        ]
        if len(layers) != len(model.moe_layers) or not all(layers):
            raise ValueError(f"not all of {len(model.moe_layers)} layers have numbers")
        for tokens, measured in (point for layer in layers for point in layer):
            if not (1 <= tokens < math.inf and 0 <= measured <= model.experts):
                raise ValueError(f"{tokens:g} tokens activate {measured:g} experts")
    except (LookupError, TypeError, ValueError, OverflowError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise LeanMoeError(f"the profile is damaged ({reason}); profile again") from error
    return layers


def _saved_curve(layer: Sequence[tuple[float, float]], rule: Rule, model: MoEShape) -> Curve:
    experts, top_k = model.experts, model.top_k
    if not _is_simple(rule):
        raise LeanMoeError(
            f"rule {rule.to_json()} needs the profile's traces replayed: "
            "pip install 'leanmoe[tune]'"
        )
    slots = top_k if rule.top_k is None else rule.top_k
    share = slots / top_k
    points = []
    for tokens, measured in layer:
        # A token activates `share` as many; so do 1/share tokens as many as one did before.
        active = experts * (1 - (1 - measured / experts) ** share)
        points.append((tokens, min(active, slots * tokens), float(slots)))
    origin = "measured: the profile's tokens"
    if slots != top_k:
        origin += ", scaled to a lower top_k"
    return from_points(points, experts, origin, float(slots))


PROFILE = "profile.json"


def find_curves(
    model: MoEShape, plan: Plan | None, profile: Path | None, assumed: Assumed
) -> CurvesOf:
    """Distinct experts from a profile where one is given, else as assumed.

    Rules that the saved curves do not cover are replayed, which needs torch: those by which tokens
    share experts for each layout of ranks anew.
    """
    if profile is None:
        assumed.check()
        return partial(assumed_curves, model, assumed)
    saved = read_json(profile / PROFILE, "profile")
    if not isinstance(saved, dict):
        raise LeanMoeError(f"profile {profile / PROFILE} is not a JSON object")
    simple = saved_curves(saved, model)
    rules = {rule for rule in _rules_of(plan) if not _is_simple(rule)}
    if not rules or plan is None:
        return lambda _scope: simple
    from leanmoe.profile.saved import Profile

    loaded = Profile.load(profile)
    shared = {rule for rule in rules if rule.is_batch_aware}
    alike = _replayed(loaded, plan, rules - shared)

    def curves_of(scope: RankLayout) -> CurveOf:
        replayed = alike | _replayed(loaded, plan, shared, scope)

        def curve_of(layer: int, rule: Rule) -> Curve:
            curve = replayed.get((layer, rule))
            return simple(layer, rule) if curve is None else curve

        return curve_of

    return cache(curves_of)


def _rules_of(plan: Plan | None) -> set[Rule]:
    if plan is None:
        return set()
    return {rule for band in plan.bands for rule in band.rules} | set(plan.prompt)


def _is_simple(rule: Rule) -> bool:
    return rule == Rule(top_k=rule.top_k, renormalise=rule.renormalise)


def _replayed(
    profile: Profile, plan: Plan, rules: set[Rule], scope: RankLayout = ALONE
) -> dict[tuple[int, Rule], Curve]:
    """Curves of these rules of the plan, in the layers that have them."""
    from leanmoe.profile.record import BATCH_SIZES, replay
    from leanmoe.routing import BatchScope

    every: Sequence[Sequence[Rule]] = [band.rules for band in plan.bands]
    every = [*every, plan.prompt] if plan.prompt else every
    wanted = {(n, rule) for layers in every for n, rule in enumerate(layers) if rule in rules}
    sizes = [scope.scopes * size for size in BATCH_SIZES]
    sizes = [size for size in sizes if size <= profile.trace.tokens]
    if wanted and not sizes:
        raise LeanMoeError(
            f"the profile's sample of {profile.trace.tokens} tokens is too small for a token of "
            f"each of {scope.scopes} data-parallel ranks"
        )
    placed = BatchScope(Placement.linear(profile.model.experts, scope.ranks))
    curves = {}
    with bar("Replaying traces", len(wanted), "layers and rules") as advance:
        for layer, rule in sorted(wanted, key=lambda pair: (pair[0], str(pair[1]))):
            runs = [
                replay(profile, layer, rule, size, None, 0, placed, scope.scopes) for size in sizes
            ]
            curves[layer, rule] = from_points(
                [(float(run.tokens), run.distinct, run.slots) for run in runs],
                profile.model.experts,
                "measured: the profile's traces, replayed under the plan",
                profile.model.top_k if rule.top_k is None else rule.top_k,
                rule.is_batch_aware,
                [run.most_loaded for run in runs],
                rule.is_batch_aware and scope.exchanges_demand,
            )
            advance(1)
    return curves
