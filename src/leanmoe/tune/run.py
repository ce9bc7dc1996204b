"""`leanmoe tune`: profile, sensitivity, layer time, allocation, validation, gain, verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from leanmoe.bench.in_process import ReplyWriter, gain_per_request
from leanmoe.core.intervals import Margin, ReplyLengths
from leanmoe.core.provenance import Provenance, collect, peak_memory
from leanmoe.core.run_folder import RunFolder
from leanmoe.core.schema import all_fields, from_json
from leanmoe.plan import Level, Plan
from leanmoe.prune.criteria import Kept
from leanmoe.results.tune import (
    LoadFront,
    LoadGain,
    LoadVerdict,
    ProfileSummary,
    SensitivitySummary,
    TextPart,
    TunedModel,
    TuneResults,
    TuneText,
    ValidatedPlan,
)
from leanmoe.runtime import apply, batching_reason, served_experts
from leanmoe.tune.alternatives import compare_strategies, within_memory
from leanmoe.tune.context import REPLIES, TuneContext, digest, prepare
from leanmoe.tune.layers import measure_sensitivities, time_layers
from leanmoe.tune.prove import (
    Proven,
    aims,
    assemble,
    level_proof,
    measure_gain,
    point_plan,
    prove_margins,
    search_loss,
    verdict_on,
    verdict_without_gain,
)
from leanmoe.tune.settings import TuneSettings


def tune(
    settings: TuneSettings, output: Path, command: str = "leanmoe.tune", overwrite: bool = False
) -> TuneResults:
    """Runs the main job into folder `output`, taking up what an earlier run left.

    Raises LeanMoeError for a setting out of range, a model that cannot be run, text that is too
    short, and a folder that holds something else.
    """
    settings.check()
    loads = settings.concurrency

    # Measure the model: what its router does, what each rule loses, how long its layers take.
    context = prepare(settings, RunFolder.open(output, settings, overwrite), command)
    sensitivities = measure_sensitivities(context)
    full = search_loss(context)
    times = time_layers(context)

    # A memory budget restricts every plan to the experts it keeps.
    kept, totals = within_memory(context, sensitivities, times)

    # Prove plans on held-out text, and show what other strategies would have lost.
    ordered = aims(context, kept, sensitivities, times, full)
    proven = prove_margins(context, kept, ordered, full)
    ends = sorted({loads[0], loads[-1]})
    strategies = [compare_strategies(context, sensitivities, load) for load in ends]

    # Measure what each proven level gains; claim what both loss and throughput bear out.
    provenance = collect(command, settings.seed)
    tuned = [_level(context, kept, *each, provenance) for each in proven.items()]
    levels = tuple(each.level for each in tuned if each.level is not None)
    Plan(context.fingerprint, levels, provenance.to_json()).save(output / "plan.json")

    text, heldout = context.text, [kind.heldout for kind in context.text.kinds]
    results = TuneResults(
        provenance=provenance,
        model=_model(context),
        settings=all_fields(settings),
        text=TuneText(
            "; ".join(f"{kind.name}: {kind.source}" for kind in text.kinds),
            text.calibration,
            TextPart(
                sum(part.documents for part in heldout),
                sum(part.tokens for part in heldout),
                sum(part.sources or 0 for part in heldout),
            ),
            text.kinds,
        ),
        profile=from_json(ProfileSummary, context.profile.to_json(), "profile"),
        sensitivity=SensitivitySummary("measured", text.searched.tokens, tuple(sensitivities)),
        fronts=tuple(front for each in tuned for front in each.fronts),
        strategies=tuple(strategies),
        total_or_activated=totals,
        gain=tuple(gain for each in tuned for gain in each.gains),
        verdicts=tuple(verdict for each in tuned for verdict in each.verdicts),
        notes=tuple(_notes(tuned, settings)),
        made_with=context.folder.made_with(),
        seconds=context.folder.seconds(),
        peak_memory_bytes=peak_memory(),
    )
    results.save(output / "results.json")
    return results


@dataclass(frozen=True)
class TunedLevel:
    """What was found within one margin; no level where nothing that is faster was proven."""

    name: str
    level: Level | None
    is_restricted: bool
    """Whether its rules are those of a memory budget."""
    fronts: Sequence[LoadFront]
    gains: Sequence[LoadGain]
    verdicts: Sequence[LoadVerdict]


def _level(
    context: TuneContext,
    kept: Kept | None,
    margin: Margin,
    proven: Proven,
    provenance: Provenance,
) -> TunedLevel:
    chosen = proven.chosen
    usable = kept if any(chosen.values()) else None  # the kept experts alone may lose too much
    proposal = assemble(context, margin, chosen, usable)
    gains, verdicts = _gains_and_verdicts(context, proven, proposal)
    verdicts = [replace(verdict, level=margin.name) for verdict in verdicts]
    faster = {v.concurrency: chosen[v.concurrency] for v in verdicts if v.accepted}
    plan = assemble(context, margin, faster, usable)
    level = None
    if not plan.is_empty:
        proof = level_proof(context, margin, verdicts, provenance)
        level = replace(plan.level, proof=proof)
    loads = context.settings.concurrency
    fronts = [replace(_front(context, kept, load, proven), level=margin.name) for load in loads]
    return TunedLevel(margin.name, level, usable is not None, fronts, gains, verdicts)


def _gains_and_verdicts(
    context: TuneContext, proven: Proven, proposal: Plan
) -> tuple[list[LoadGain], list[LoadVerdict]]:
    """One of each for every load; no gains without a plan, or where this process cannot serve."""
    loads = context.settings.concurrency
    why = batching_reason(context.model)
    if not any(proven.chosen.values()):
        why = "there is no plan"
    if why:
        return [], [verdict_without_gain(context, proven, load, why) for load in loads]
    gains = [measure_gain(context, proposal, load) for load in loads]
    verdicts = [verdict_on(context, proven, gain) for gain in gains]
    return gains, [_per_request(context, proven, proposal, verdict) for verdict in verdicts]


def _per_request(
    context: TuneContext, proven: Proven, plan: Plan, verdict: LoadVerdict
) -> LoadVerdict:
    """The verdict with the gain per finished request; refused if replies surely grow by more."""
    if not (verdict.accepted and verdict.gain and context.settings.reply_prompts):
        return verdict
    replies = _replies(context, plan, verdict.concurrency)
    found = gain_per_request(verdict.gain, replies)
    verdict = replace(verdict, replies=replies, per_request=found)
    if found is None or replies.ratio is None:
        return replace(verdict, reason=f"{verdict.reason}. {not_measurable(replies)}")
    shown = (
        f"per finished request {found.ratio - 1:+.1%} ({found.low - 1:+.1%} to "
        f"{found.high - 1:+.1%}), replies {replies.ratio.ratio:.2f} times as long"
    )
    if found.high >= 1:
        return replace(verdict, reason=f"{verdict.reason}. On replies that end: {shown}")
    reason = f"replies grow by more than it gains: {shown}: no rules for decoding at this load"
    left = proven.alone or proven.chosen[verdict.concurrency]
    if left is not None:
        verdict = replace(verdict, loss=left.worst.loss, kinds=left.kinds)
    return replace(verdict, accepted=False, reason=reason)


def not_measurable(replies: ReplyLengths) -> str:
    """Why there is no ratio of lengths."""
    ended, whose = replies.full_ended, "the full model's"
    if replies.plan_ended is not None:
        ended, whose = replies.both_ended, "both models'"
    return (
        f"Reply lengths not measurable on this model: {ended} of {replies.prompts} of {whose} "
        f"replies ended within {replies.most} tokens"
    )


def _replies(context: TuneContext, plan: Plan, load: int) -> ReplyLengths:
    """Replies of both to the first windows of each kind, as long as the load's prompts."""
    how, kinds = context.settings, context.text.proved.values()
    each = -(-max(how.reply_prompts, *how.concurrency) // len(kinds))
    prompts = [row for w in kinds for row in w.ids_SN[:each, : how.input_len].tolist()]
    writer = ReplyWriter(context.model, prompts, how.reply_cap, how.confidence, how.seed)

    def lengths(plan: Plan, load: int, what: str, *about: object) -> tuple[int, ...]:
        compute = partial(writer.lengths, plan, load, f"Replies to their end, {what}")
        return context.take(REPLIES, tuple[int, ...], compute, *about)

    full = lengths(Plan(context.fingerprint), 1, "full model", "full")
    about = (load, digest(plan.level.rules))
    return writer.compare(full, lambda: lengths(plan, load, "plan", *about))


def _front(context: TuneContext, kept: Kept | None, load: int, proven: Proven) -> LoadFront:
    """What was validated at one concurrency, with what each plan activates."""
    entries, chosen = [], proven.chosen[load]
    points = list(proven.points[load])
    if chosen is not None and chosen not in points:  # prompt rules alone, tested for all loads
        points.append(chosen)
    for proved in points:
        point = proved.point
        rules = point_plan(context, point, kept).bands[0].rules
        activities = context.activities(rules, load)
        slots = tuple(activity.slots for activity in activities)
        entries.append(
            ValidatedPlan(
                name=point.name,
                strategy=point.strategy,
                predicted_loss=point.predicted_loss,
                modelled_time=point.modelled_time,
                slots=sum(slots) / len(slots),
                slots_per_layer=slots,
                distinct=sum(a.distinct for a in activities) / len(activities),
                loss=proved.worst.loss,
                accepted=proved.accepted,
                reason=proved.reason,
                chosen=proved == chosen,
                rules=point.decode,
                prompt=point.prompt,
                kinds=proved.kinds,
            )
        )
    return LoadFront(load, tuple(entries))


def _model(context: TuneContext) -> TunedModel:
    model, shape = context.model, context.shape
    with apply(model, Plan(context.fingerprint), experts=served_experts(model)) as applied:
        implementation = applied.implementation
    return TunedModel(
        context.settings.model,
        context.fingerprint,
        shape.total_parameters(),
        shape.active_parameters(),
        str(model.dtype).removeprefix("torch."),
        implementation,
    )


def _notes(tuned: Sequence[TunedLevel], settings: TuneSettings) -> list[str]:
    notes = [
        f"Loss is measured on what a service reads: replies of {settings.output_len} tokens to "
        f"prompts of {settings.input_len} on average. The prompt runs under the prompt rules, the "
        "reply under the decode rules, in steps of as many requests as the concurrency says.",
        "Layer times on the fronts are modelled from timings of one layer on this machine; "
        "throughput is measured end to end.",
    ]
    if settings.keep is not None and any(each.is_restricted for each in tuned):
        notes.append(
            f"Memory budget: every rule uses the same {settings.keep} of the experts; `leanmoe "
            f"prune --criterion {settings.criterion} --keep {settings.keep}` writes a checkpoint "
            "with fewer."
        )
    elif settings.keep is not None:
        notes.append(
            f"No plan with {settings.keep} of the experts is within a margin: the memory budget is "
            "not met, and the plan is empty."
        )
    for each in tuned:
        refused = [str(verdict.concurrency) for verdict in each.verdicts if not verdict.accepted]
        if each.level is None:
            notes.append(
                f"Nothing that is faster was proven within {each.name}: the plan has no such level."
            )
        elif refused:
            notes.append(
                f"Level {each.name}: no gain is claimed at concurrency {', '.join(refused)}: the "
                "band stays empty. Its rules for prompts are at work there all the same."
            )
    return notes
