"""`leanmoe tune`: profile, sensitivity, allocation, validation, gain, verdict, in that order."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from leanmoe.bench.compare import Variant, compare, same_prompts
from leanmoe.bench.metrics import ClosedLoop
from leanmoe.core.files import write_json
from leanmoe.core.provenance import collect, peak_memory
from leanmoe.core.run_folder import RunFolder
from leanmoe.plan import Band, Plan, Rule
from leanmoe.profile.record import profile as measure_profile
from leanmoe.profile.saved import Profile
from leanmoe.prune.kept_experts import restricted
from leanmoe.runtime import IMPLEMENTATION, apply, served_experts
from leanmoe.stats.paired import (
    Losses,
)
from leanmoe.tune.allocate import (
    Point,
)
from leanmoe.tune.compare_strategies import compare_strategies, strategy_points
from leanmoe.tune.inputs import Inputs, read_inputs
from leanmoe.tune.layer_time import LayerTime
from leanmoe.tune.prune_or_skip import kept_by_budget, total_or_activated
from leanmoe.tune.sensitivity import (
    Candidate,
    Phase,
    Sensitivity,
    candidates,
    measure,
)
from leanmoe.tune.settings import TuneSettings
from leanmoe.tune.validate import (
    Proved,
    plan_losses,
    point_plan,
    points_for,
    prove,
    verdict_on,
    workloads,
)

REQUESTS = 24
"""In a throughput run with one request at a time; as the square root of the load above it, so that
a run lasts for more than a moment and for no more than a few seconds at any."""
STOCK_REPEATS = 3
"""Transformers' own experts stand beside; the gain is not measured against them."""

logger = logging.getLogger(__name__)


def tune(settings: TuneSettings, output: Path, command: str, overwrite: bool = False) -> Path:
    """Runs the main job into folder `output`, taking up what an earlier run left; returns it."""
    settings.check()
    folder = RunFolder.open(output, settings, overwrite)
    inputs = read_inputs(settings)
    profile = _profile(inputs, folder, settings, command)
    found = _sensitivities(inputs, folder, settings)
    full = Losses.from_json(folder.step("full", partial(_full_losses, inputs)))
    times = _times(inputs, profile, folder, settings)
    totals: list[dict[str, Any]] = []
    if settings.keep is not None:
        kept = kept_by_budget(inputs, settings, folder.step)
        totals = total_or_activated(inputs, profile, found, times, kept, settings, folder.step)
        inputs = replace(inputs, kept=kept[settings.keep])
    proved = _prove_all(inputs, profile, found, times, full, folder, settings)
    strategies = [
        compare_strategies(inputs, profile, found, decode_batch, settings, folder.step)
        for decode_batch in sorted({settings.concurrency[0], settings.concurrency[-1]})
        if settings.strategy == "auto"
    ]
    chosen = {load: _last_accepted(points) for load, points in proved.items()}
    if not any(chosen.values()):  # the experts of the budget alone lose too much
        inputs = replace(inputs, kept=None)
    proposal = assemble(inputs, chosen, settings)
    gain = [
        folder.step(f"gain-{load}", partial(_gain, inputs, proposal, load, settings), timed=True)
        for load in settings.concurrency
    ]
    verdicts = [
        verdict_on(load, up_to, proved[load], chosen[load], entry)
        for load, up_to, entry in zip(settings.concurrency, settings.bands(), gain, strict=True)
    ]
    faster = {v["concurrency"]: chosen[v["concurrency"]] for v in verdicts if v["accepted"]}
    plan = assemble(inputs, faster, settings, collect(command, settings.seed).to_json())
    plan.save(folder.path / "plan.json")
    results = {
        "leanmoe_results": 1,
        "provenance": collect(command, settings.seed).to_json(),
        "model": _model(inputs, settings),
        "settings": settings.to_json(),
        "text": {"source": inputs.source, **inputs.counts},
        "profile": profile.to_json(),
        "sensitivity": {
            "label": "measured",
            "tokens": inputs.searched.tokens,
            "candidates": [s.to_json() for s in found],
        },
        "fronts": [
            _front(inputs, load, proved[load], chosen[load], profile)
            for load in settings.concurrency
        ],
        "strategies": strategies,
        **({"total_or_activated": totals} if totals else {}),
        "gain": gain,
        "verdicts": verdicts,
        "notes": _notes(verdicts, settings, inputs.kept is not None),
        "made_with": folder.made_with(),
        "seconds": folder.seconds(),
        "peak_memory_bytes": peak_memory(),
    }
    write_json(folder.path / "results.json", results)
    return folder.path


def assemble(
    inputs: Inputs,
    chosen: Mapping[int, Proved | None],
    settings: TuneSettings,
    provenance: Mapping[str, Any] | None = None,
) -> Plan:
    """One plan of the points chosen for the loads; a load without one gets an empty band.

    The prompt rules are shared by all loads: they stay only if some load was accepted with them.
    With a memory budget its experts are the only ones, in every band and beyond the last.
    """
    fingerprint = inputs.shape.fingerprint()
    bands: list[Band] = []
    prompt: tuple[Rule, ...] = ()
    for load, up_to in zip(settings.concurrency, settings.bands(), strict=True):
        point = chosen.get(load)
        empty = (Rule(),) * fingerprint.moe_layers
        bands.append(Band(up_to, point.point.decode if point else empty))
        if point is not None:
            prompt = point.point.prompt
    plan = Plan(fingerprint, tuple(bands), prompt, dict(provenance or {}))
    return plan if inputs.kept is None else restricted(plan, inputs.kept)


def _full_losses(inputs: Inputs) -> Any:
    return plan_losses(inputs, inputs.proved, _empty(inputs), None, "Full model").to_json()


def _empty(inputs: Inputs) -> Plan:
    return Plan(inputs.shape.fingerprint())


def _profile(inputs: Inputs, folder: RunFolder, settings: TuneSettings, command: str) -> Profile:
    def compute() -> dict[str, int]:
        with apply(inputs.model, _empty(inputs), experts=IMPLEMENTATION):
            measured = measure_profile(
                inputs.model, inputs.profiled, seed=settings.seed, command=command
            )
        measured.save(folder.path)
        return {"tokens": measured.tokens, "documents": measured.documents}

    folder.step("profiling", compute)
    return Profile.load(folder.path)


def _sensitivities(inputs: Inputs, folder: RunFolder, settings: TuneSettings) -> list[Sensitivity]:
    """Measured in one piece for each company and phase, each stored when it is done."""
    fingerprint = inputs.shape.fingerprint()
    tried = candidates(fingerprint, settings.concurrency, inputs.shape.router)
    found: list[Sensitivity] = []
    for decode_batch, phase in sorted({(c.decode_batch, c.phase) for c in tried}):
        group = [c for c in tried if (c.decode_batch, c.phase) == (decode_batch, phase)]
        name = f"sensitivity-{phase}-{decode_batch}"
        stored = folder.step(name, _measuring(inputs, group))
        found += [Sensitivity.from_json(piece) for piece in stored]
    return found


def _measuring(inputs: Inputs, group: Sequence[Candidate]) -> Callable[[], Any]:
    what = f"Sensitivity, {group[0].phase}, {group[0].decode_batch} at once"

    def compute() -> Any:
        fingerprint = inputs.shape.fingerprint()
        measured = measure(inputs.model, inputs.searched, group, fingerprint, what)
        return [each.to_json() for each in measured]

    return compute


def _times(
    inputs: Inputs, profile: Profile, folder: RunFolder, settings: TuneSettings
) -> dict[int, dict[Phase, LayerTime]]:
    def compute() -> Any:
        found = workloads(inputs, profile, settings)
        return {
            str(load): {phase: vars(time) for phase, time in phases.items()}
            for load, phases in found.items()
        }

    stored = folder.step("layer-times", compute, timed=True)
    return {
        int(load): {phase: LayerTime(**time) for phase, time in phases.items()}
        for load, phases in stored.items()
    }


def _prove_all(
    inputs: Inputs,
    profile: Profile,
    found: Sequence[Sensitivity],
    times: Mapping[int, Mapping[Phase, LayerTime]],
    full: Losses,
    folder: RunFolder,
    settings: TuneSettings,
) -> dict[int, list[Proved]]:
    """The largest load decides the prompt rules that all loads share; then each its own bands."""
    proved: dict[int, list[Proved]] = {}
    prompt: tuple[Rule, ...] | None = None
    for load in reversed(settings.concurrency):
        if settings.strategy in ("auto", "leanmoe"):
            points = points_for(load, found, profile, times[load], settings, full.mean, prompt)
            if inputs.kept is not None:
                nothing = (Rule(),) * len(profile.layers)
                points.insert(0, Point((), nothing, 0.0, 1.0, "the experts kept alone"))
        else:
            points = strategy_points(inputs, profile, found, load, times[load], settings)
        proved[load] = prove(inputs, points, load, full, settings, folder.step)
        while prompt is None and (best := _last_accepted(proved[load])) is not None:
            # At every load, with or without a band of its own, the prompt rules will be at work.
            alone = replace(best.point, decode=(Rule(),) * len(best.point.decode))
            found_alone = prove(inputs, [alone], load, full, settings, folder.step)
            if found_alone[0].verdict.accepted:
                prompt = best.point.prompt
            else:
                proved[load].remove(best)
    return proved


def _last_accepted(points: Sequence[Proved]) -> Proved | None:
    accepted = [point for point in points if point.verdict.accepted]
    return accepted[-1] if accepted else None


def _gain(inputs: Inputs, plan: Plan, load: int, settings: TuneSettings) -> dict[str, Any]:
    requests = max(2 * load, math.ceil(REQUESTS * load**0.5))
    wanted = ClosedLoop(load, settings.input_len, settings.output_len, requests)

    def running(plan: Plan, experts: str) -> Callable[[], AbstractContextManager[Any]]:
        return lambda: apply(inputs.model, plan, experts=experts)

    experts = served_experts(inputs.model)
    variants = [
        Variant("full", running(_empty(inputs), experts)),
        Variant("plan", running(plan, experts)),
    ]
    if experts != "stock":
        stock = f"transformers {inputs.model.config._experts_implementation}"
        variants.append(Variant(stock, running(_empty(inputs), "stock"), STOCK_REPEATS))
    measured = compare(
        inputs.model,
        same_prompts(inputs.prompts, wanted),
        wanted,
        variants,
        settings.repeats,
        settings.seed,
    )
    ratio = measured.ratio("plan", settings.confidence).to_json()
    return {**measured.to_json(), "ratio": ratio}


def _front(
    inputs: Inputs, load: int, points: Sequence[Proved], chosen: Proved | None, profile: Profile
) -> dict[str, Any]:
    from leanmoe.profile.replay import replay

    entries = []
    for point in points:
        rules = point_plan(inputs, point.point).bands[0].rules
        replays = [replay(profile, n, rule, load) for n, rule in enumerate(rules)]
        distinct = sum(r.distinct for r in replays) / len(replays)
        entries.append(point.to_json(point is chosen, [r.slots for r in replays], distinct))
    return {"concurrency": load, "points": entries}


def _model(inputs: Inputs, settings: TuneSettings) -> dict[str, Any]:
    experts = served_experts(inputs.model)
    with apply(inputs.model, _empty(inputs), experts=experts) as applied:
        implementation = applied.implementation
    return {
        "name": settings.model,
        "fingerprint": vars(inputs.shape.fingerprint()),
        "parameters": inputs.shape.total_parameters(),
        "active_parameters": inputs.shape.active_parameters(),
        "dtype": str(inputs.model.dtype).removeprefix("torch."),
        "experts_implementation": implementation,
    }


def _notes(
    verdicts: Sequence[Mapping[str, Any]], settings: TuneSettings, is_restricted: bool
) -> list[str]:
    replies = settings.output_len
    notes = [
        f"Loss is measured on what a service at this load reads: replies of {replies} tokens to "
        f"prompts of {settings.input_len} on average, the prompt under the prompt rules, the "
        "reply under the decode rules in the company of as many others as the load has.",
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
    refused = [str(v["concurrency"]) for v in verdicts if not v["accepted"]]
    if refused:
        notes.append(f"No gain is claimed at {', '.join(refused)} at once: the band stays empty.")
    return notes
