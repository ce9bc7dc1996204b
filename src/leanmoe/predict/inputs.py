"""`leanmoe predict`: from what a user names to what `cost` computes with. Needs no torch, unless a
profile's traces have to be replayed under a plan.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leanmoe.core.errors import LeanMoeError, did_you_mean
from leanmoe.core.files import read_json
from leanmoe.core.progress import bar
from leanmoe.models.catalog import CONFIGS
from leanmoe.models.shape import MoEShape, read_shape
from leanmoe.models.step_model import Model, read_model
from leanmoe.plan import Plan, Rule
from leanmoe.plan.placement import Placement
from leanmoe.predict.active_experts import CurveOf, CurvesOf, assumed_curves, saved_curves
from leanmoe.predict.communication import fitted, read_collectives
from leanmoe.predict.constants import Constants, read_constants, shipped
from leanmoe.predict.deployment import Deployment
from leanmoe.predict.expert_curves import Assumed, Curve, from_points
from leanmoe.predict.hardware import Gpu
from leanmoe.predict.sampled_steps import ALONE, BatchScope

if TYPE_CHECKING:
    from leanmoe.profile.saved import Profile

PROFILE = "profile.json"
MOST_CHOSEN = 64
"""GPUs that are tried before a user has to say how many."""


def find_model(name: str) -> Model:
    """A model by name: one of the study's by its facts here, else by its config.json."""
    if name in CONFIGS and not Path(name).exists():
        print(f"leanmoe: {name}'s shape is known here; nothing is fetched", file=sys.stderr)
        return read_model(CONFIGS[name], name)
    with _suggesting(name):
        return read_model(name)


def find_shape(name: str) -> MoEShape:
    """A model's shape alone, found as `find_model` does, where its attention may be any."""
    if name in CONFIGS and not Path(name).exists():
        return find_model(name).shape
    with _suggesting(name):
        return read_shape(name)


@contextmanager
def _suggesting(name: str) -> Iterator[None]:
    """Adds the known names near one that is not found."""
    try:
        yield
    except LeanMoeError as error:
        near = "" if Path(name).exists() else did_you_mean(name, CONFIGS).strip()
        raise LeanMoeError(f"{error}; {near}" if near else str(error)) from error


def find_plan(
    model: Model, path: Path | None, top_k: int | None, guaranteed: int | None
) -> Plan | None:
    """A saved plan, or a uniform one; raises LeanMoeError where both are asked for or none fits."""
    if path is not None and (top_k is not None or guaranteed is not None):
        raise LeanMoeError("give --plan, or --top-k and --guaranteed, not both")
    fingerprint = model.shape.fingerprint()
    if path is not None:
        plan = Plan.load(path)
        plan.check(fingerprint, more_experts=True)
        return plan
    if top_k is None and guaranteed is None:
        return None
    plan = Plan.uniform(fingerprint, Rule(top_k=top_k, guaranteed=guaranteed))
    plan.check(fingerprint)
    return plan


def find_constants(
    path: Path | None, communication: Path | None = None, gpu: Gpu | None = None
) -> Constants:
    """The shipped constants, a user's own before them, and measured collectives before both."""
    found = shipped() if path is None else shipped().merged(read_constants(path))
    if communication is None or gpu is None:
        return found
    rates, _ = found.rates_for(gpu.name)
    own = fitted(rates, read_collectives(communication), gpu)
    return found.merged(Constants((), {gpu.name: own}))


def find_deployment(
    model: Model,
    gpu: Gpu,
    gpus: int | None,
    tensor: int | None,
    expert: int,
    data: int,
    pipeline: int,
) -> Deployment:
    """What the user asked for; with nothing said, the fewest GPUs (a power of 2) that hold it."""
    if tensor is None and gpus is None and data == pipeline == 1:
        return _fewest(model, gpu, expert)
    if tensor is None:
        shared = data * pipeline
        if gpus is not None and gpus % shared:
            raise LeanMoeError(
                f"--gpus {gpus} is no multiple of --data-parallel-size x "
                f"--pipeline-parallel-size, {shared}"
            )
        tensor = max(1, (gpus or shared) // shared)
    here = Deployment(gpu, tensor, expert, data, pipeline)
    if gpus is not None and here.gpus != gpus:
        raise LeanMoeError(
            f"--tensor-parallel-size {tensor} x --data-parallel-size {data} x "
            f"--pipeline-parallel-size {pipeline} are {here.gpus} GPUs, --gpus says {gpus}"
        )
    here.check(model)
    here.memory(model)
    return here


def _fewest(model: Model, gpu: Gpu, expert: int) -> Deployment:
    last: LeanMoeError | None = None
    count = max(1, expert)
    while count <= MOST_CHOSEN:
        tensor = min(count, gpu.per_node)
        here = Deployment(gpu, tensor, expert, count // tensor)
        try:
            here.check(model)
            here.memory(model)
        except LeanMoeError as error:
            last = error
            count *= 2
            continue
        return here
    raise last or LeanMoeError(f"--expert-parallel-size {expert}: say how the model lies on GPUs")


def find_curves(
    model: Model, plan: Plan | None, profile: Path | None, assumed: Assumed
) -> CurvesOf:
    """Distinct experts from a profile where one is given, else as assumed.

    Rules that the saved curves do not cover are replayed, which needs torch: those by which tokens
    share experts for each company anew.
    """
    if profile is None:
        assumed.check()
        return partial(assumed_curves, model, assumed)
    saved: Any = read_json(profile / PROFILE, "profile")
    simple = saved_curves(saved, model)
    rules = {rule for rule in _rules_of(plan) if not _is_simple(rule)}
    if not rules or plan is None:
        return lambda _scope: simple
    from leanmoe.profile.saved import Profile

    loaded = Profile.load(profile)
    shared = {rule for rule in rules if rule.is_batch_aware}
    alike = _replayed(loaded, plan, rules - shared)

    def curves_of(scope: BatchScope) -> CurveOf:
        replayed = alike | _replayed(loaded, plan, shared, scope)

        def curve_of(layer: int, rule: Rule) -> Curve:
            found = replayed.get((layer, rule))
            return simple(layer, rule) if found is None else found

        return curve_of

    return cache(curves_of)


def _rules_of(plan: Plan | None) -> set[Rule]:
    if plan is None:
        return set()
    return {rule for band in plan.bands for rule in band.rules} | set(plan.prompt)


def _is_simple(rule: Rule) -> bool:
    return rule == Rule(top_k=rule.top_k, keep_weights=rule.keep_weights)


def _replayed(
    profile: Profile, plan: Plan, rules: set[Rule], scope: BatchScope = ALONE
) -> dict[tuple[int, Rule], Curve]:
    """Curves of these rules of the plan, in the layers that have them."""
    from leanmoe.profile.replay import BATCH_SIZES, replay

    every: Sequence[Sequence[Rule]] = [band.rules for band in plan.bands]
    every = [*every, plan.prompt] if plan.prompt else every
    wanted = {(n, rule) for layers in every for n, rule in enumerate(layers) if rule in rules}
    sizes = [scope.companies * size for size in BATCH_SIZES]
    sizes = [size for size in sizes if size <= profile.trace.tokens]
    if wanted and not sizes:
        raise LeanMoeError(
            f"the profile's sample of {profile.trace.tokens} tokens is too small for a token of "
            f"each of {scope.companies} data-parallel ranks"
        )
    placement = Placement.linear(profile.model.experts, scope.ranks)
    found = {}
    with bar("Replaying traces", len(wanted), "layers and rules") as advance:
        for layer, rule in sorted(wanted, key=lambda pair: (pair[0], str(pair[1]))):
            runs = [
                replay(profile, layer, rule, size, None, 0, placement, scope.companies)
                for size in sizes
            ]
            found[layer, rule] = from_points(
                [(float(run.tokens), run.distinct, run.slots) for run in runs],
                profile.model.experts,
                "measured: the profile's traces, replayed under the plan",
                profile.model.top_k if rule.top_k is None else rule.top_k,
                rule.is_batch_aware,
                [run.most_loaded for run in runs],
                rule.is_batch_aware and scope.is_told,
            )
            advance(1)
    return found


@dataclass(frozen=True)
class Limits:
    """What a deployment must keep to, and what a GPU costs."""

    tpot_ms: float | None = None
    ttft_ms: float | None = None
    price: float | None = None
    """Of a GPU and hour."""

    def check(self) -> None:
        """Raises LeanMoeError for a value that is not above 0."""
        flags = {"--tpot": self.tpot_ms, "--ttft": self.ttft_ms, "--price": self.price}
        for flag, value in flags.items():
            if value is not None and not value > 0:
                raise LeanMoeError(f"{flag} is {value:g}: it must be above 0")
