"""What the paper's settings cost on a model that runs here: k, its skipping shapes, pruning.

Next-token loss on held-out documents, paired by document with the full model.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from leanmoe.core.files import read_json, write_json
from leanmoe.core.intervals import LossChange
from leanmoe.core.provenance import collect
from leanmoe.core.quiet import quiet_transformers
from leanmoe.core.schema import from_json, to_json
from leanmoe.core.text import read_corpus, split
from leanmoe.models.shape import MoEShape
from leanmoe.plan import Fingerprint, Plan, Rule
from leanmoe.prune.criteria import (
    CRITERIA,
    Kept,
    as_plan,
    best_experts,
    kept_count,
    observe,
    rank_experts,
)
from leanmoe.results.study import QualityRow, StudiedQuality
from leanmoe.results.tune import TextPart
from leanmoe.runtime import apply, load_model, shape_of
from leanmoe.scoring.divergence import losses
from leanmoe.scoring.windows import Windows, cut
from leanmoe.stats.losses import Losses
from leanmoe.stats.paired import CONFIDENCE, loss_increase
from leanmoe.study.settings import StudySettings

FILE = "quality.json"
KEEP = ("75%", "50%", "25%")
"""The paper's 48, 32 and 16 of 64."""
GRID_CRITERION = "reap"
GRID_KEEP = ("75%", "50%")
CALIBRATION_TOKENS, HELDOUT_TOKENS = 32768, 16384
"""That experts are ranked on, and that losses are measured on."""
QUICK_TOKENS = 12_288
"""Of either, for a quick study: enough documents for an interval, and no more."""
QUICK_CRITERIA = ("random", "activate-count", "reap")
SHAPES = {
    "(6, 8, 8, 61), the paper's best": (6 / 8, 1.0, 1.0, 1.0),
    "rising, 4 to 8": (0.5, 1.0, 1.0, 1.0),
    "falling, 8 to 4": (1.0, 1.0, 0.5, 0.0),
    "hill, 4 to 8 to 4": (0.5, 1.0, 0.5, 0.5),
    "valley, 8 to 4 to 8": (1.0, 0.5, 1.0, 0.5),
}
"""(b, h, e, p) as shares: experts in the first layer, at the turn, in the last; its depth."""


@dataclass(frozen=True)
class Case:
    """One setting to measure."""

    group: str
    name: str
    slots: float
    """Mean experts a token."""
    share: float
    """The share of experts that remain."""
    plan: Plan


def shape_rules(model: Fingerprint, shape: tuple[float, float, float, float]) -> tuple[Rule, ...]:
    """A (b, h, e, p) shape at this depth and k: two straight lines, rounded."""
    begin, high, end, turn = shape
    depth_L = np.linspace(0.0, 1.0, model.moe_layers)
    share_L = np.interp(depth_L, [0.0, turn, 1.0], [begin, high, end])
    return tuple(Rule(top_k=max(1, round(share * model.top_k))) for share in share_L.tolist())


def saved_quality(settings: StudySettings, output: Path, command: str) -> StudiedQuality:
    """Losses under every setting; minutes on two cores.

    Kept in folder `output` as soon as they are measured, and taken from there by a later run with
    the same settings.
    """
    path = output / FILE
    if path.exists():
        saved = from_json(StudiedQuality, read_json(path, "quality"), f"quality {path}")
        if saved.settings == _asked(settings):
            print(f"leanmoe: {path} holds these settings' losses already", file=sys.stderr)
            return saved
    quality = measure_quality(settings, command)
    write_json(path, to_json(quality))
    return quality


def _asked(settings: StudySettings) -> dict[str, Any]:
    """What the losses depend on."""
    return {name: getattr(settings, name) for name in ("model", "text", "quick", "seed")}


def measure_quality(settings: StudySettings, command: str) -> StudiedQuality:
    """Measures the losses on held-out text, each beside the full model's."""
    quiet_transformers()
    corpus = read_corpus(settings.text)
    calibration, heldout = split(corpus.documents, 0.5, settings.seed)
    model, tokenizer = load_model(settings.model)
    shape = shape_of(model)
    ranking, windows = (
        cut(part, tokenizer, tokens=QUICK_TOKENS if settings.quick else tokens)
        for part, tokens in ((calibration, CALIBRATION_TOKENS), (heldout, HELDOUT_TOKENS))
    )
    cases = list(_cases(model, shape, ranking, settings))
    full = _losses(model, Plan(shape.fingerprint()), windows, "Full model")
    rows = []
    for number, case in enumerate(cases, 1):
        what = f"{number} of {len(cases)}: {case.name}, {case.share:.0%}"
        increase = loss_increase(full, _losses(model, case.plan, windows, what), CONFIDENCE)
        change = LossChange(**increase.to_json())
        rows.append(QualityRow(case.group, case.name, case.slots, case.share, change))
    return StudiedQuality(
        label="measured",
        model=settings.model,
        text=corpus.source,
        provenance=collect(command, settings.seed),
        quick=settings.quick,
        heldout=TextPart(windows.documents, windows.tokens),
        rows=tuple(rows),
        settings=_asked(settings),
        confidence=CONFIDENCE,
    )


def _losses(model: Any, plan: Plan, windows: Windows, what: str) -> Losses:
    with apply(model, plan, experts="leanmoe"):
        return losses(model, windows, what=what)


def _cases(
    model: Any, shape: MoEShape, ranking: Windows, settings: StudySettings
) -> Iterator[Case]:
    print_ = shape.fingerprint()
    every = range(shape.top_k - 1, 0, -1) if not settings.quick else (shape.top_k * 3 // 4,)
    for k in every:
        yield Case("k", f"k={k}", k, 1.0, Plan.uniform(print_, Rule(top_k=k)))
        kept = Rule(top_k=k, renormalise=0.0)
        yield Case("k, weights kept", f"k={k}", k, 1.0, Plan.uniform(print_, kept))
    for name, values in SHAPES.items():
        rules = shape_rules(print_, values)
        mean = float(np.mean([rule.top_k or 0 for rule in rules]))
        yield Case("shape", name, mean, 1.0, Plan.per_layer(print_, rules))
    yield from _pruned(model, shape, ranking, settings)


def _pruned(
    model: Any, shape: MoEShape, ranking: Windows, settings: StudySettings
) -> Iterator[Case]:
    shares = KEEP[:1] if settings.quick else KEEP
    counts = {keep: kept_count(keep, shape) for keep in shares}
    seen = observe(model, ranking)
    for name in CRITERIA:
        if settings.quick and name not in QUICK_CRITERIA:
            continue
        least = min(counts.values())
        scores = rank_experts(CRITERIA[name], shape, settings.seed, model, ranking, least, seen)
        for keep, count in counts.items():
            kept: Kept = best_experts(scores, count, shape)
            share = count / shape.experts
            yield Case("pruning", name, shape.top_k, share, as_plan(kept, shape))
            if name == GRID_CRITERION and keep in GRID_KEEP:
                for k in (shape.top_k * 3 // 4, shape.top_k // 2):
                    yield Case("both", f"{name}, k={k}", k, share, _fewer(as_plan(kept, shape), k))


def _fewer(plan: Plan, k: int) -> Plan:
    rules = tuple(Rule(top_k=k, experts=rule.experts) for rule in plan.bands[0].rules)
    return Plan.per_layer(plan.model, rules)
