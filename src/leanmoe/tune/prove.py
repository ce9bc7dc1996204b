"""From candidate plans to what is claimed at each concurrency: loss proven, throughput measured.

Plans are validated on text that the search never saw, safest first, up to the first that fails.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from leanmoe.bench.in_process import compare_plans
from leanmoe.bench.settings import BenchSettings, Lengths
from leanmoe.core.intervals import Margin
from leanmoe.core.schema import from_json
from leanmoe.plan import Band, Plan, Rule
from leanmoe.prune.criteria import Kept, restricted
from leanmoe.results.tune import LoadGain, LoadVerdict, Sensitivity
from leanmoe.stats.losses import Losses
from leanmoe.stats.paired import Verdict, fixed_sequence, non_inferior
from leanmoe.tune.allocate import FrontPoint, points_for
from leanmoe.tune.context import FULL_LOSSES, GAIN, VALIDATION, TuneContext, digest
from leanmoe.tune.layers import PhaseTimes


@dataclass(frozen=True)
class Proved:
    """A point of the front after validation on held-out text."""

    point: FrontPoint
    verdict: Verdict


def full_losses(context: TuneContext) -> Losses:
    """The full model's loss on the text that plans are proven on."""
    empty = Plan(context.fingerprint)
    compute = partial(context.losses, context.text.proved, empty, None, "Full model")
    return context.take(FULL_LOSSES, Losses, compute)


@dataclass(frozen=True)
class Proof:
    """Validates points at one concurrency after the other, on the same held-out text."""

    context: TuneContext
    full: Losses
    kept: Kept | None
    """The experts of the memory budget: every plan is restricted to them."""

    def validate(self, points: Sequence[FrontPoint], decode_batch: int) -> list[Proved]:
        """The points in their order, to the first that is not within the margin."""
        proved: list[Proved] = []

        def accepts(point: FrontPoint) -> bool:
            settings = self.context.settings
            verdict = non_inferior(
                self.full,
                self._losses(point, decode_batch),
                Margin(settings.margin),
                settings.confidence,
                settings.seed,
            )
            proved.append(Proved(point, verdict))
            return verdict.accepted

        fixed_sequence(points, accepts)
        return proved

    def _losses(self, point: FrontPoint, decode_batch: int) -> Losses:
        plan = point_plan(self.context, point, self.kept)
        what = f"Validate, concurrency {decode_batch}"
        compute = partial(self.context.losses, self.context.text.proved, plan, decode_batch, what)
        rules = [*plan.bands[0].rules, *plan.prompt]
        if all(rule.is_empty for rule in point.decode):  # the decode batch decides nothing then
            return self.context.take(VALIDATION, Losses, compute, "prompt", digest(rules))
        return self.context.take(VALIDATION, Losses, compute, decode_batch, digest(rules))


def prove_all(
    proof: Proof, sensitivities: Sequence[Sensitivity], times: Mapping[int, PhaseTimes]
) -> dict[int, list[Proved]]:
    """Proven points by concurrency: the prompt rules of all are those of the largest one's best.

    A plan has one set of prompt rules, at work at every concurrency. The largest concurrency, where
    prompts cost most, chooses them together with its decode rules, from the fastest plan that holds
    down; a smaller one then chooses its decode rules beside them. Prompt rules are taken only if
    they hold alone too, since a concurrency may end without a band of its own.
    """
    proved: dict[int, list[Proved]] = {}
    prompt: tuple[Rule, ...] | None = None
    for concurrency in reversed(proof.context.settings.concurrency):
        points = _points(proof, sensitivities, concurrency, times[concurrency], prompt)
        proved[concurrency] = proof.validate(points, concurrency)
        while prompt is None and (best := last_accepted(proved[concurrency])) is not None:
            alone = replace(best.point, decode=proof.context.no_rules)
            if proof.validate([alone], concurrency)[0].verdict.accepted:
                prompt = best.point.prompt
            else:
                proved[concurrency].remove(best)
    return proved


def _points(
    proof: Proof,
    sensitivities: Sequence[Sensitivity],
    concurrency: int,
    times: PhaseTimes,
    prompt: tuple[Rule, ...] | None,
) -> list[FrontPoint]:
    context = proof.context
    points = points_for(context, sensitivities, concurrency, times, proof.full.mean, prompt)
    if proof.kept is not None:
        points.insert(0, FrontPoint((), context.no_rules, 0.0, 1.0, "the experts kept alone"))
    return points


def last_accepted(points: Sequence[Proved]) -> Proved | None:
    """The fastest point within the margin, if any."""
    accepted = [point for point in points if point.verdict.accepted]
    return accepted[-1] if accepted else None


def point_plan(context: TuneContext, point: FrontPoint, kept: Kept | None) -> Plan:
    """The point's rules at every concurrency, with the experts of the memory budget alone."""
    bands = Plan.per_layer(context.fingerprint, point.decode).bands
    plan = Plan(context.fingerprint, bands, point.prompt)
    return plan if kept is None else restricted(plan, kept)


def assemble(
    context: TuneContext,
    chosen: Mapping[int, Proved | None],
    kept: Kept | None,
    provenance: Mapping[str, Any] | None = None,
) -> Plan:
    """One plan of the points chosen by concurrency; one without a point gets an empty band.

    The prompt rules are shared: they stay only if some concurrency was accepted with them. With a
    memory budget its experts are the only ones, in every band and beyond the last.
    """
    bands: list[Band] = []
    prompt: tuple[Rule, ...] = ()
    for concurrency, up_to in context.settings.band_ends().items():
        proved = chosen.get(concurrency)
        bands.append(Band(up_to, proved.point.decode if proved else context.no_rules))
        if proved is not None:
            prompt = proved.point.prompt
    plan = Plan(context.fingerprint, tuple(bands), prompt, dict(provenance or {}))
    return plan if kept is None else restricted(plan, kept)


def measure_gain(context: TuneContext, plan: Plan, concurrency: int) -> LoadGain:
    """Full model, plan and Transformers' own experts in turn, on held-out text, as bench does."""
    rules = [rule for band in plan.bands for rule in band.rules]
    key = digest([*rules, *plan.prompt])
    compute = partial(_measure_gain, context, plan, concurrency)
    return context.take(GAIN, LoadGain, compute, concurrency, key)


def _measure_gain(context: TuneContext, plan: Plan, concurrency: int) -> LoadGain:
    tuned = context.settings
    settings = BenchSettings(
        targets=(tuned.model,),
        concurrency=(concurrency,),
        input_len=Lengths(tuned.input_len, tuned.input_len),
        output_len=Lengths(tuned.output_len, tuned.output_len),
        repeats=tuned.repeats,
        precision=tuned.precision,
        confidence=tuned.confidence,
        stock=True,
        seed=tuned.seed,
    )
    stream = context.text.proved.ids_SN.flatten().tolist()
    compared = compare_plans(context.model, {"plan": plan}, settings, stream)
    entry = {
        **compared.to_json("plan"),
        "concurrency": concurrency,
        "input_tokens": tuned.input_len,
        "output_tokens": tuned.output_len,
    }
    return from_json(LoadGain, entry, "gain")


def verdict_on(
    context: TuneContext, proved: Mapping[int, Sequence[Proved]], gain: LoadGain
) -> LoadVerdict:
    """Accepted if a plan's loss is within the margin and its throughput surely above full's."""
    ratio, concurrency = gain.ratio, gain.concurrency
    up_to = context.settings.band_ends()[concurrency]
    points, chosen = proved[concurrency], last_accepted(proved[concurrency])
    if chosen is None:
        return _none_within(points, concurrency, up_to)
    if ratio.low <= 1.0:
        reason = (
            f"throughput is not surely higher ({ratio.low:.3f} to {ratio.high:.3f} times): "
            "no rules for decoding at this load"
        )
    elif points[-1].verdict.accepted:
        reason = "the fastest plan tried is within the margin"
    else:
        reason = "the next faster plan is not within the margin"
    reason = ". ".join([reason, *gain.notes])
    return LoadVerdict(concurrency, up_to, ratio.low > 1.0, chosen.verdict.loss, ratio, reason)


def verdict_without_gain(
    context: TuneContext, proved: Mapping[int, Sequence[Proved]], concurrency: int, why: str
) -> LoadVerdict:
    """Accepted by its loss alone, where `why` the gain cannot be measured in this process."""
    up_to = context.settings.band_ends()[concurrency]
    chosen = last_accepted(proved[concurrency])
    if chosen is None:
        return _none_within(proved[concurrency], concurrency, up_to)
    reason = f"the plan is within the margin; its gain was not measured: {why}"
    return LoadVerdict(concurrency, up_to, True, chosen.verdict.loss, None, reason)


def _none_within(points: Sequence[Proved], concurrency: int, up_to: int | None) -> LoadVerdict:
    last = points[0].verdict.reason if points else "no plan was predicted to be within it"
    reason = f"no plan is within the margin: {last}"
    return LoadVerdict(concurrency, up_to, False, None, None, reason)
