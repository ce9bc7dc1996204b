"""A made-up model with sensitivities, and what strategies have to work with on it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import cast

from leanmoe.core.run_folder import RunFolder
from leanmoe.models.shape import read_shape
from leanmoe.plan import Fingerprint, Rule
from leanmoe.results.tune import Candidate, Phase, Sensitivity, StrategyBudget
from leanmoe.tune.context import TuneContext, TuneWindows
from leanmoe.tune.layers import candidates
from leanmoe.tune.settings import TuneSettings
from leanmoe.tune.strategies import Setting
from tests.profile.example import made_up_profile

MODEL = Fingerprint("Model", 7, 6, 64, 8)


def anew(_phase: Phase, _decode_batch: int) -> float:
    """Weights as a model normalises them."""
    return 1.0


def cost(layer: int, rule: Rule) -> float:
    """Experts a token, as if a share kept that part of them; later layers cost a little more."""
    slots = float(MODEL.top_k if rule.top_k is None else rule.top_k)
    slots = slots if rule.guaranteed is None else float(rule.guaranteed)
    slots = slots if rule.budget is None else rule.budget / 8
    slots *= 1.0 if rule.threshold is None else 1.0 - 0.9 * rule.threshold
    slots *= 1.0 if rule.top_p is None else rule.top_p
    return slots * (1 + 0.01 * layer)


def sensitivity(candidate: Candidate) -> Sensitivity:
    slots = cost(candidate.layer, candidate.rule)
    divergence = 0.001 * (candidate.layer + 1) * (MODEL.top_k - min(slots, 8.0)) ** 2
    return Sensitivity(
        **vars(candidate),
        divergence=divergence,
        loss_difference=0.5 * divergence,
        slots=slots,
        distinct=4 * slots,
    )


def setting(budget: float, decode_batch: int = 1) -> Setting:
    tried = [sensitivity(c) for c in candidates(MODEL, (1, decode_batch), anew)]
    moved = {(n, k): (8 - k) * (6 - n) / 10 for n in range(6) for k in range(1, 9)}
    return Setting(MODEL, decode_batch, StrategyBudget("slots", budget), cost, tried, moved)


def context(folder: Path, concurrency: tuple[int, ...] = (1, 8)) -> TuneContext:
    """What the stages of a run on the reference model share, its model and its text left out."""
    settings = TuneSettings("reference", concurrency=concurrency)
    shape, measured = read_shape("reference"), made_up_profile()
    model = replace(measured.model, moe_layers=len(shape.moe_layers))
    return TuneContext(
        settings,
        RunFolder.open(folder, settings, overwrite=False),
        "test",
        None,
        shape,
        cast(TuneWindows, None),
        replace(measured, model=model),
    )
