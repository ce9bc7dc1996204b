"""The steps between text and a proven plan: sensitivities, layer times, fronts, validation.

What is claimed at each load: only what both the loss and the throughput bear out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from leanmoe.bench.continuous import PREFILL_TOKENS_A_STEP
from leanmoe.plan import Plan, Rule
from leanmoe.profile.replay import replay
from leanmoe.profile.saved import Profile
from leanmoe.prune.kept_experts import restricted
from leanmoe.runtime import IMPLEMENTATION, apply
from leanmoe.scoring.divergence import losses
from leanmoe.scoring.windows import Windows
from leanmoe.stats.paired import (
    Losses,
    Verdict,
    fixed_sequence,
    non_inferior,
)
from leanmoe.tune.allocate import (
    SHARES_OF_MARGIN,
    Point,
    Workload,
    front,
)
from leanmoe.tune.inputs import Inputs
from leanmoe.tune.layer_time import LayerTime, fit
from leanmoe.tune.sensitivity import (
    Phase,
    Sensitivity,
)
from leanmoe.tune.settings import TuneSettings

BATCH_TOKENS = 8192


def plan_losses(
    inputs: Inputs, windows: Windows, plan: Plan, decode_batch: int | None, what: str
) -> Losses:
    """Next-token loss per document of `windows` under `plan`, `decode_batch` requests decoding."""
    with apply(
        inputs.model,
        plan,
        experts=IMPLEMENTATION,
        decode_batch=decode_batch,
        prompt_tokens=windows.prompt_in_call,
    ):
        return losses(inputs.model, windows, what, decode_batch, BATCH_TOKENS)


def workloads(
    inputs: Inputs, profile: Profile, settings: TuneSettings
) -> dict[int, dict[Phase, LayerTime]]:
    """Layer times by load, for prompt steps and for decode steps."""
    top_k = inputs.shape.top_k
    fewer = [Rule(), *(Rule(top_k=k) for k in {max(1, top_k // 2), max(1, top_k // 4)})]
    prefill = fit(inputs.model, profile, prefill_step(profile), fewer, settings.seed)
    found: dict[int, dict[Phase, LayerTime]] = {}
    for decode_batch in settings.concurrency:
        rules = [*fewer]
        if decode_batch > 1:
            rules += [Rule(guaranteed=max(1, top_k // 2)), Rule(guaranteed=max(1, top_k // 4))]
        decode = fit(inputs.model, profile, decode_batch, rules, settings.seed)
        found[decode_batch] = {"prompt": prefill, "decode": decode}
    return found


def prefill_step(profile: Profile) -> int:
    """Tokens of the prefill steps that are timed: those of service, as far as the trace goes."""
    return min(PREFILL_TOKENS_A_STEP, profile.trace.tokens)


def full_activity(
    profile: Profile, decode_batch: int
) -> dict[tuple[Phase, int], tuple[float, float]]:
    """Slots a token and distinct experts a step of the full model, by phase and layer."""
    activity: dict[tuple[Phase, int], tuple[float, float]] = {}
    for layer in range(len(profile.layers)):
        decode = replay(profile, layer, Rule(), decode_batch)
        prompt = replay(profile, layer, Rule(), prefill_step(profile), steps=8)
        activity["decode", layer] = (decode.slots, decode.distinct)
        activity["prompt", layer] = (prompt.slots, prompt.distinct)
    return activity


@dataclass(frozen=True)
class Proved:
    """A point of the front after validation on held-out text."""

    point: Point
    verdict: Verdict

    def to_json(self, chosen: bool, slots: Sequence[float], distinct: float) -> dict[str, Any]:
        """As results.json holds it."""
        return {
            "name": self.point.name,
            "strategy": self.point.strategy,
            "predicted_loss": self.point.predicted_loss,
            "modelled_time": self.point.modelled_time,
            "slots": sum(slots) / len(slots),
            "slots_per_layer": list(slots),
            "distinct": distinct,
            "loss": self.verdict.loss.to_json(),
            "accepted": self.verdict.accepted,
            "reason": self.verdict.reason,
            "chosen": chosen,
            "rules": [rule.to_json() for rule in self.point.decode],
            "prompt": [rule.to_json() for rule in self.point.prompt],
        }


def points_for(
    decode_batch: int,
    sensitivities: Sequence[Sensitivity],
    profile: Profile,
    times: Mapping[Phase, LayerTime],
    settings: TuneSettings,
    full_loss: float,
    prompt: tuple[Rule, ...] | None,
) -> list[Point]:
    """The plans to validate at one load, safest first."""
    workload = Workload(
        decode_batch, settings.input_len, settings.output_len, prefill_step(profile), times
    )
    budgets = [share * settings.margin * full_loss for share in SHARES_OF_MARGIN]
    return front(sensitivities, full_activity(profile, decode_batch), workload, budgets, prompt)


def prove(
    inputs: Inputs,
    points: Sequence[Point],
    decode_batch: int,
    full: Losses,
    settings: TuneSettings,
    store: Callable[[str, Callable[[], Any]], Any],
) -> list[Proved]:
    """Validates points in their order, to the first that is not within the margin."""
    proved: list[Proved] = []
    numbers = {id(point): number for number, point in enumerate(points)}

    def accepts(point: Point) -> bool:
        name = f"validation-{decode_batch}-{numbers[id(point)]}"
        if all(rule.is_empty for rule in point.decode):  # then company decides nothing
            name = f"validation-prompt-{_digest(point.prompt)}"

        def compute() -> dict[str, Any]:
            plan = point_plan(inputs, point)
            what = f"Validate, {decode_batch} at once"
            return plan_losses(inputs, inputs.proved, plan, decode_batch, what).to_json()

        found = Losses.from_json(store(name, compute))
        verdict = non_inferior(full, found, settings.margin, settings.confidence, settings.seed)
        proved.append(Proved(point, verdict))
        return verdict.accepted

    fixed_sequence(points, accepts)
    return proved


def _digest(rules: Sequence[Rule]) -> str:
    text = json.dumps([rule.to_json() for rule in rules])
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def point_plan(inputs: Inputs, point: Point) -> Plan:
    """The point's rules at every load, with the experts of the memory budget if there is one."""
    fingerprint = inputs.shape.fingerprint()
    plan = Plan.per_layer(fingerprint, point.decode)
    plan = Plan(fingerprint, plan.bands, point.prompt)
    return plan if inputs.kept is None else restricted(plan, inputs.kept)


def verdict_on(
    load: int,
    up_to: int | None,
    points: Sequence[Proved],
    chosen: Proved | None,
    gain: Mapping[str, Any],
) -> dict[str, Any]:
    """Accepted if a plan's loss is within the margin and its throughput surely above full's."""
    ratio = gain["ratio"]
    verdict: dict[str, Any] = {
        "concurrency": load,
        "up_to": up_to,
        "accepted": False,
        "loss": None,
        "gain": None,
    }
    if chosen is None:
        last = points[0].verdict.reason if points else "no plan was predicted to be within it"
        return {**verdict, "reason": f"no plan is within the margin: {last}"}
    verdict |= {"loss": chosen.verdict.loss.to_json(), "gain": ratio}
    if ratio["low"] <= 1.0:
        reason = (
            f"throughput is not surely higher ({ratio['low']:.3f} to {ratio['high']:.3f} times): "
            "the full model stays"
        )
        return {**verdict, "reason": reason}
    stopped = points[-1].verdict
    reason = (
        "the fastest plan tried is within the margin"
        if stopped.accepted
        else "the next faster plan is not within the margin"
    )
    return {**verdict, "accepted": True, "reason": reason}
