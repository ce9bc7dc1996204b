"""From candidate plans to what is claimed at each concurrency: loss proven, throughput measured.

Plans are validated on text that the search never saw. Which, and in which order, is fixed on
calibration text before any is scored: aim by aim from the safest, and in each its prompt rules
alone, then its plan at each load. Testing stops at the first that is not within the margin on every
kind of text. So the chance that any plan is accepted wrongly is that of one test (`fixed_sequence`
says why), however many loads, aims and kinds there are.

Each margin has a sequence of its own along the one order, at the full confidence, and becomes a
level of the plan: its claim is as sure as if it were the only one. A plan is scored once, whatever
sequences it stands in. What passes within a margin passes within a larger one, so a later level is
never slower. Of several claims together no such thing is said: that all hold is less sure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from leanmoe.bench.in_process import compare_plans
from leanmoe.bench.settings import BenchSettings, Lengths
from leanmoe.core.intervals import Margin
from leanmoe.core.provenance import Provenance
from leanmoe.core.schema import from_json
from leanmoe.plan import Band, KindProof, Level, LevelProof, Plan, Rule
from leanmoe.prune.criteria import Kept, restricted
from leanmoe.results.tune import KindLoss, LoadGain, LoadVerdict, Sensitivity
from leanmoe.scoring.windows import Windows
from leanmoe.stats.losses import Divergence, Losses
from leanmoe.stats.paired import fixed_sequence, non_inferior
from leanmoe.tune.allocate import SHARES_OF_MARGIN, FrontPoint, points_for
from leanmoe.tune.context import FULL_LOSSES, GAIN, VALIDATION, TuneContext, digest
from leanmoe.tune.layers import PhaseTimes
from leanmoe.tune.renormalise import refined, with_values_of
from leanmoe.tune.settings import TuneSettings


@dataclass(frozen=True)
class Proved:
    """A point of the front after validation on held-out text of each kind."""

    point: FrontPoint
    kinds: tuple[KindLoss, ...]

    @property
    def accepted(self) -> bool:
        """Whether it is within the margin on every kind."""
        return all(each.accepted for each in self.kinds)

    @property
    def worst(self) -> KindLoss:
        """The kind that it loses most on: a plan is as good as that."""
        return max(self.kinds, key=lambda each: (not each.accepted, each.loss.upper_bound))

    @property
    def reason(self) -> str:
        """Why it is accepted or not."""
        return f"{self.worst.kind}: {self.worst.reason}"


@dataclass(frozen=True)
class Aim:
    """Plans that aim at one loss, by load: the prompt rules of all alone, and with decode rules."""

    loss: float
    """The predicted loss aimed at, nats a token."""
    alone: Mapping[int, FrontPoint]
    own: Mapping[int, FrontPoint]


@dataclass(frozen=True)
class Proven:
    """What was tested at each load, in order, and what was chosen of it."""

    points: Mapping[int, Sequence[Proved]]
    chosen: Mapping[int, Proved | None]
    alone: Proved | None
    """The chosen level's prompt rules alone: what a load without a band of its own runs."""


def search_loss(context: TuneContext) -> float:
    """The full model's loss on calibration text, nats a token: all that the search knows of it."""
    empty = Plan(context.fingerprint)
    compute = partial(context.losses, context.text.searched, empty, None, "Full model")
    return context.take(FULL_LOSSES, Losses, compute).mean


@dataclass(frozen=True)
class Proof:
    """Validates points on the same held-out text, within one margin."""

    context: TuneContext
    margin: Margin
    kept: Kept | None
    """The experts of the memory budget: every plan is restricted to them."""

    def validate(self, load: int, point: FrontPoint) -> Proved:
        """The point on each kind of text, with `load` requests decoding at once."""
        plan = point_plan(self.context, point, self.kept)
        rules = [*plan.bands[0].rules, *plan.prompt]
        is_batch_aware = any(rule.is_batch_aware for rule in rules)
        about = (load if is_batch_aware else "any", digest(rules))
        kinds = []
        for kind in self.context.text.proved:
            draws = range(self.context.settings.batch_draws if is_batch_aware else 1)
            compute = partial(self._drawn, kind, plan, load, draws)
            drawn = self.context.take(VALIDATION, tuple[Divergence, ...], compute, kind, *about)
            kinds.append(kind_loss(self.context.settings, self.margin, kind, drawn))
        return Proved(point, tuple(kinds))

    def _drawn(
        self, kind: str, plan: Plan, load: int, draws: Sequence[int]
    ) -> tuple[Divergence, ...]:
        what = f"Validate on {kind}, concurrency {load}"
        return tuple(self.context.divergence(kind, plan, load, draw, what) for draw in draws)


def kind_loss(
    settings: TuneSettings,
    margin: Margin,
    kind: str,
    drawn: Sequence[Divergence],
    sharing: int = 1,
) -> KindLoss:
    """The verdict on one kind of text, from one divergence for each draw of the batches.

    `sharing` verdicts share the error (`holm`).
    """
    verdict = non_inferior(
        drawn[0].full,
        [each.plan for each in drawn],
        margin,
        settings.confidence,
        settings.seed,
        sharing,
    )
    total = sum(drawn[1:], start=drawn[0])
    return KindLoss(
        kind,
        loss=verdict.loss,
        nats=verdict.nats,
        divergence=total.mean_kl,
        flips=total.flips,
        worst_tenth=total.worst_tenth(),
        batch_draws=len(drawn),
        accepted=verdict.accepted,
        reason=verdict.reason,
    )


def aims(
    context: TuneContext,
    kept: Kept | None,
    sensitivities: Sequence[Sensitivity],
    times: Mapping[int, PhaseTimes],
    loss: float,
) -> list[Aim]:
    """What to test, from calibration text alone, safest first; `loss` is the full model's there.

    All margins share the order, which aims at shares of each. A level has one set of prompt rules,
    at work at every load. The largest load, where prompts cost most, chooses them together with its
    decode rules; the others choose theirs beside them.
    """
    loads = context.settings.concurrency
    made: list[Aim] = []
    if kept is not None:
        point = FrontPoint((), context.no_rules, 0.0, 1.0, "the experts kept alone")
        made.append(Aim(0.0, dict.fromkeys(loads, point), {}))
    for budget in sorted({each for m in context.settings.margins for each in losses(m, loss)}):

        def points(load: int, prompt: tuple[Rule, ...] | None) -> list[FrontPoint]:
            budgets = [budget]  # noqa: B023 - called in this round alone
            return points_for(context, sensitivities, load, times[load], budgets, prompt)

        prompt = points(loads[-1], None)[-1].prompt
        both = {load: points(load, prompt) for load in loads}
        alone = {load: replace(two[0], decode=context.no_rules) for load, two in both.items()}
        aim = Aim(budget, alone, {load: two[-1] for load, two in both.items()})
        if not made or (aim.alone, aim.own) != (made[-1].alone, made[-1].own):
            made.append(aim)
    return [_renormalised(aim, context, made[-1].own) for aim in made]


def losses(margin: Margin, loss: float) -> list[float]:
    """The predicted losses that a margin's plans aim at, nats a token, least first."""
    allowed = margin.value if margin.in_nats else margin.value * loss
    return [share * allowed for share in SHARES_OF_MARGIN]


def _renormalised(aim: Aim, context: TuneContext, fastest: Mapping[int, FrontPoint]) -> Aim:
    """The aim with weights that count, layer by layer, as each load's fastest plan wants it."""
    own = {}
    for load, point in aim.own.items():
        values = refined(context, fastest[load].prompt, fastest[load].decode, load)
        own[load] = replace(point, decode=with_values_of(point.decode, values))
    return replace(aim, own=own)


def prove_all(proof: Proof, ordered: Sequence[Aim]) -> Proven:
    """Tests the aims in their order to the first failure; takes the fastest that all loads can.

    Of what is accepted any choice is as sure, so the aim is taken whose experts need the least
    modelled time over all loads. A load whose own plan is not accepted there runs the prompt rules
    alone.
    """
    loads = proof.context.settings.concurrency
    empty = proof.kept is None
    tests = [
        (load, point)
        for aim in ordered
        for load, point in [(loads[0], aim.alone[loads[0]]), *aim.own.items()]
        if not (empty and _is_empty(point))
    ]
    tested: dict[tuple[int, FrontPoint], Proved] = {}

    def accepts(test: tuple[int, FrontPoint]) -> bool:
        tested[test] = proof.validate(*test)
        return tested[test].accepted

    accepted = set(fixed_sequence(tests, accepts))

    def at(aim: Aim, load: int) -> Proved | None:
        own, alone = aim.own.get(load), aim.alone[load]
        if own is not None and (load, own) in accepted:
            return tested[load, own]
        first = (loads[0], aim.alone[loads[0]])
        return Proved(alone, tested[first].kinds) if first in accepted else None

    usable = [
        {load: at(aim, load) for load in loads}
        for aim in ordered
        if (empty and _is_empty(aim.alone[loads[0]])) or (loads[0], aim.alone[loads[0]]) in accepted
    ]
    best = min(usable, key=_time, default=dict.fromkeys(loads))
    points = {load: [tested[t] for t in tests if t in tested and t[0] == load] for load in loads}
    prompt = next((each.point.prompt for each in best.values() if each), ())
    alone = [p for p in tested.values() if p.point.prompt == prompt and _has_no_decode(p.point)]
    return Proven(points, best, alone[0] if alone else None)


def _time(chosen: Mapping[int, Proved | None]) -> float:
    return sum(1.0 if each is None else each.point.modelled_time for each in chosen.values())


def _has_no_decode(point: FrontPoint) -> bool:
    return all(rule.is_empty for rule in point.decode)


def _is_empty(point: FrontPoint) -> bool:
    return not point.prompt and _has_no_decode(point)


def point_plan(context: TuneContext, point: FrontPoint, kept: Kept | None) -> Plan:
    """The point's rules at every concurrency, with the experts of the memory budget alone."""
    bands = Plan.per_layer(context.fingerprint, point.decode).bands
    plan = Plan.banded(context.fingerprint, bands, point.prompt)
    return plan if kept is None else restricted(plan, kept)


def prove_margins(
    context: TuneContext, kept: Kept | None, ordered: Sequence[Aim], loss: float
) -> dict[Margin, Proven]:
    """What is proven within each margin, by a sequence of its own up to the largest of its aims."""
    found = {}
    for margin in context.settings.margins:
        within = [aim for aim in ordered if aim.loss <= losses(margin, loss)[-1]]
        found[margin] = prove_all(Proof(context, margin, kept), within)
    return found


def assemble(
    context: TuneContext, margin: Margin, chosen: Mapping[int, Proved | None], kept: Kept | None
) -> Plan:
    """A margin's level of the points chosen by concurrency; one without gets an empty band.

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
    plan = Plan(context.fingerprint, (Level(margin.name, tuple(bands), prompt),))
    return plan if kept is None else restricted(plan, kept)


def level_proof(
    context: TuneContext, margin: Margin, verdicts: Sequence[LoadVerdict], made: Provenance
) -> LevelProof:
    """What a level was accepted by: each kind of text at the load that it loses most at."""
    at_work = [verdict for verdict in verdicts if verdict.loss is not None]
    kinds = []
    for text in context.text.kinds:
        found = [each for v in at_work for each in v.kinds if each.kind == text.name]
        changes = [each.nats if margin.in_nats else each.loss for each in found]
        worst = max(changes, key=lambda change: change.upper_bound)
        kinds.append(KindProof(text.name, text.source, worst.ratio, worst.upper_bound))
    with context.full() as applied:
        implementation = applied.implementation
    return LevelProof(
        tuple(kinds),
        margin,
        context.settings.confidence,
        tuple(verdict.concurrency for verdict in at_work),
        engine="transformers",
        implementation=implementation,
        dtype=str(context.model.dtype).removeprefix("torch."),
        hardware=made.hardware,
        versions=made.versions,
        commit=made.commit,
    )


def measure_gain(context: TuneContext, plan: Plan, concurrency: int) -> LoadGain:
    """Full model, plan and Transformers' own experts in turn, on held-out text, as bench does."""
    key = digest(plan.level.rules)
    compute = partial(_measure_gain, context, plan, concurrency)
    gain = context.take(GAIN, LoadGain, compute, concurrency, key)
    return replace(gain, level=plan.level.name)  # levels of the same rules share what is stored


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
    heldout = Windows.joined(list(context.text.proved.values()))
    stream = heldout.ids_SN.flatten().tolist()
    compared = compare_plans(context.model, {"plan": plan}, settings, stream)
    entry = {
        **compared.to_json("plan"),
        "concurrency": concurrency,
        "input_tokens": tuned.input_len,
        "output_tokens": tuned.output_len,
    }
    return from_json(LoadGain, entry, "gain")


def verdict_on(context: TuneContext, proven: Proven, gain: LoadGain) -> LoadVerdict:
    """Accepted if a plan's loss is within the margin and its throughput surely above full's."""
    ratio, concurrency = gain.ratio, gain.concurrency
    up_to = context.settings.band_ends()[concurrency]
    points, chosen = proven.points[concurrency], proven.chosen[concurrency]
    if chosen is None:
        return _none_within(points, concurrency, up_to)
    accepted = ratio.low > 1.0
    if not accepted:
        reason = (
            f"throughput is not surely higher ({ratio.low:.3f} to {ratio.high:.3f} times): "
            "no rules for decoding at this load"
        )
        chosen = proven.alone or chosen
    elif points and points[-1].accepted:
        reason = "the fastest plan tried is within the margin on every kind of text"
    else:
        reason = "the next faster plan is not within the margin on every kind of text"
    reason = ". ".join([reason, *gain.notes])
    loss, kinds = chosen.worst.loss, chosen.kinds
    return LoadVerdict(concurrency, up_to, accepted, loss, ratio, reason, kinds)


def verdict_without_gain(
    context: TuneContext, proven: Proven, concurrency: int, why: str
) -> LoadVerdict:
    """Accepted by its loss alone, where `why` the gain cannot be measured in this process."""
    up_to = context.settings.band_ends()[concurrency]
    chosen = proven.chosen[concurrency]
    if chosen is None:
        return _none_within(proven.points[concurrency], concurrency, up_to)
    reason = f"the plan is within the margin; its gain was not measured: {why}"
    loss, kinds = chosen.worst.loss, chosen.kinds
    return LoadVerdict(concurrency, up_to, True, loss, None, reason, kinds)


def _none_within(points: Sequence[Proved], concurrency: int, up_to: int | None) -> LoadVerdict:
    last = points[0].reason if points else "none was tested at this load"
    kinds = points[0].kinds if points else ()
    reason = f"no plan is within the margin: {last}"
    return LoadVerdict(concurrency, up_to, False, None, None, reason, kinds)
