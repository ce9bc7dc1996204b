"""`leanmoe tune`: profile, sensitivity, layer time, allocation, validation, gain, verdict."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from leanmoe.core.provenance import collect, peak_memory
from leanmoe.core.run_folder import RunFolder
from leanmoe.core.schema import all_fields, from_json
from leanmoe.plan import Plan
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
from leanmoe.tune.context import TuneContext, prepare
from leanmoe.tune.layers import measure_sensitivities, time_layers
from leanmoe.tune.prove import (
    Proof,
    Proven,
    assemble,
    levels,
    measure_gain,
    point_plan,
    prove_all,
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
    proof = Proof(context, kept)
    proven = prove_all(proof, levels(proof, sensitivities, times, full))
    ends = sorted({loads[0], loads[-1]})
    strategies = [compare_strategies(context, sensitivities, load) for load in ends]

    # Measure what the proven plan gains; claim what both loss and throughput bear out.
    chosen = proven.chosen
    usable = kept if any(chosen.values()) else None  # the kept experts alone may lose too much
    proposal = assemble(context, chosen, usable)
    gains, verdicts = _gains_and_verdicts(context, proven, proposal)
    faster = {v.concurrency: chosen[v.concurrency] for v in verdicts if v.accepted}
    provenance = collect(command, settings.seed)
    assemble(context, faster, usable, provenance.to_json()).save(output / "plan.json")

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
        fronts=tuple(_front(proof, load, proven) for load in loads),
        strategies=tuple(strategies),
        total_or_activated=totals,
        gain=tuple(gains),
        verdicts=tuple(verdicts),
        notes=tuple(_notes(verdicts, settings, usable is not None)),
        made_with=context.folder.made_with(),
        seconds=context.folder.seconds(),
        peak_memory_bytes=peak_memory(),
    )
    results.save(output / "results.json")
    return results


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
    return gains, [verdict_on(context, proven, gain) for gain in gains]


def _front(proof: Proof, load: int, proven: Proven) -> LoadFront:
    """What was validated at one concurrency, with what each plan activates."""
    entries, chosen = [], proven.chosen[load]
    points = list(proven.points[load])
    if chosen is not None and chosen not in points:  # prompt rules alone, tested for all loads
        points.append(chosen)
    for proved in points:
        point = proved.point
        rules = point_plan(proof.context, point, proof.kept).bands[0].rules
        activities = proof.context.activities(rules, load)
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


def _notes(
    verdicts: Sequence[LoadVerdict], settings: TuneSettings, is_restricted: bool
) -> list[str]:
    notes = [
        f"Loss is measured on what a service reads: replies of {settings.output_len} tokens to "
        f"prompts of {settings.input_len} on average. The prompt runs under the prompt rules, the "
        "reply under the decode rules, in steps of as many requests as the concurrency says.",
        "Layer times on the fronts are modelled from timings of one layer on this machine; "
        "throughput is measured end to end.",
    ]
    if settings.keep is not None and is_restricted:
        notes.append(
            f"Memory budget: every rule uses the same {settings.keep} of the experts; `leanmoe "
            f"prune --criterion {settings.criterion} --keep {settings.keep}` writes a checkpoint "
            "with fewer."
        )
    elif settings.keep is not None:
        notes.append(
            f"No plan with {settings.keep} of the experts is within the margin: the memory budget "
            "is not met, and the plan is empty."
        )
    refused = [str(verdict.concurrency) for verdict in verdicts if not verdict.accepted]
    if refused:
        where = ", ".join(refused)
        notes.append(
            f"No gain is claimed at concurrency {where}: the band stays empty. A plan's rules "
            "for prompts are at work there all the same."
        )
    return notes
