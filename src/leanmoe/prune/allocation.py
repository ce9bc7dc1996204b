"""How many experts each layer keeps, where layers may differ: EvoESAP (arXiv 2603.06003).

The order in which experts go within a layer is fixed by a criterion; what is searched is each
layer's number, under a fixed total. An evolution in which a child moves experts from one layer to
another; whoever is most like the full model by a fitness that the caller measures survives.

Letters: L MoE layers.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from leanmoe.core.errors import LeanMoeError
from leanmoe.core.progress import bar
from leanmoe.models.shape import MoEShape
from leanmoe.prune.criteria import Scores, as_plan, best_experts, check_count
from leanmoe.runtime import IMPLEMENTATION, apply
from leanmoe.scoring.acceptance import Acceptance
from leanmoe.scoring.windows import Windows

Counts = tuple[int, ...]
"""For each MoE layer how many experts remain."""
ALLOCATION_TOKENS = 4096
"""Tokens of calibration text on which each allocation is compared with the full model."""


@dataclass(frozen=True)
class Evolution:
    """How long the search goes on: 1 + generations x children measurements."""

    generations: int = 8
    children: int = 6
    parents: int = 3
    moves: int = 3
    """Moves between layers that a child may make at most."""
    step_share: float = 1 / 16
    """The share of a layer's experts that one move takes."""


@dataclass(frozen=True)
class Allocated:
    """The best numbers found, and their fitness beside the even ones'."""

    counts: Counts
    fitness: float
    even_fitness: float
    measured: int


def allocate(
    model: Any,
    scores_LE: Scores,
    windows: Windows,
    shape: MoEShape,
    count: int,
    protected: tuple[tuple[int, int], ...] = (),
    seed: int = 0,
) -> Allocated:
    """EvoESAP: numbers of experts whose mean is `count`, fittest by acceptance on the windows.

    The fitness is how often the full model would accept the pruned one's next token: `Acceptance`.
    """
    against = Acceptance(model, windows)

    def fitness(counts: Counts) -> float:
        try:
            kept = best_experts(scores_LE, counts, shape, protected)
        except LeanMoeError:  # more protected than so few leave room for
            return 0.0
        with apply(model, as_plan(kept, shape), experts=IMPLEMENTATION):
            return against.of(model)

    evolution = Evolution()
    total = 1 + evolution.generations * evolution.children
    with bar("Allocating experts", total, "allocations") as advance:
        return evolve(count, shape, fitness, evolution, seed, advance)


def evolve(
    kept: int,
    shape: MoEShape,
    fitness: Callable[[Counts], float],
    evolution: Evolution = Evolution(),
    seed: int = 0,
    progress: Callable[[int], None] = lambda _: None,
) -> Allocated:
    """The fittest numbers of experts whose mean over layers is `kept`; never worse than even ones.

    Raises LeanMoeError where no layer may differ: each keeps the fewest or the most it can.
    """
    draw = random.Random(seed)
    layers = len(shape.moe_layers)
    step = whole_step(shape, evolution.step_share)
    even = (kept,) * layers
    least = fewest(shape)
    if layers < 2 or kept - least < step or shape.experts - kept < step:
        raise LeanMoeError(
            f"layers cannot keep different numbers of experts: {kept} of {shape.experts} on "
            f"average, {least} at least, {layers} layers"
        )
    known = {even: fitness(even)}
    progress(1)
    for _ in range(evolution.generations):
        parents = sorted(known, key=lambda counts: -known[counts])[: evolution.parents]
        for _ in range(evolution.children):
            child = _child(draw.choice(parents), step, least, shape.experts, evolution, draw)
            if child not in known:
                known[child] = fitness(child)
            progress(1)
    best = max(known, key=lambda counts: known[counts])
    return Allocated(best, known[best], known[even], len(known))


def fewest(shape: MoEShape) -> int:
    """The smallest number of experts that a layer can run with, in whole groups."""
    groups = shape.router.limiting_groups
    for kept in range(groups, shape.experts + 1, groups):
        try:
            check_count(kept, shape)
        except LeanMoeError:
            continue
        return kept
    return shape.experts


def whole_step(shape: MoEShape, share: float) -> int:
    """Experts of one move: about `share` of a layer's, in whole groups."""
    groups = shape.router.limiting_groups
    return max(groups, round(share * shape.experts / groups) * groups)


def _child(
    parent: Counts, step: int, least: int, most: int, evolution: Evolution, draw: random.Random
) -> Counts:
    counts = list(parent)
    for _ in range(draw.randint(1, evolution.moves)):
        givers = [n for n, count in enumerate(counts) if count - step >= least]
        takers = [n for n, count in enumerate(counts) if count + step <= most]
        pairs = [(giver, taker) for giver in givers for taker in takers if giver != taker]
        if pairs:
            giver, taker = draw.choice(pairs)
            counts[giver] -= step
            counts[taker] += step
    return tuple(counts)


def first_windows(windows: Windows, tokens: int) -> Windows:
    """The first of the windows, until they hold so many tokens; their documents' names stay."""
    held = windows.lengths_S.cumsum(0)
    count = int((held < tokens).sum()) + 1
    return replace(
        windows,
        ids_SN=windows.ids_SN[:count],
        lengths_S=windows.lengths_S[:count],
        documents_S=windows.documents_S[:count],
    )
