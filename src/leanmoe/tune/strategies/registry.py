"""What a strategy is, and all of them by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from leanmoe.core.errors import LeanMoeError, did_you_mean
from leanmoe.plan import Fingerprint, Rule
from leanmoe.tune.sensitivity import Sensitivity

Kind = Literal["slots", "distinct"]
Cost = Callable[[int, Rule], float]
"""Mean cost of a rule in a layer, by replay: no pass of the model."""


@dataclass(frozen=True)
class Budget:
    """What all strategies may spend: a mean over layers."""

    kind: Kind
    value: float


@dataclass(frozen=True)
class Setting:
    """What a strategy has to work with at one load."""

    model: Fingerprint
    together: int
    budget: Budget
    cost: Cost
    sensitivities: Sequence[Sensitivity] = ()
    perturbation: Mapping[tuple[int, int], float] | None = None
    """LExI's: how much layer l's output moves on random input with k experts, by (l, k)."""
    measure: Callable[[tuple[Rule, ...]], float] | None = None
    """Next-token loss under one rule per layer, on calibration text."""

    def mean_cost(self, rules: Sequence[Rule]) -> float:
        """Mean cost of one rule per layer."""
        return sum(self.cost(n, rule) for n, rule in enumerate(rules)) / len(rules)


@dataclass(frozen=True)
class Strategy:
    """A way to choose one rule per layer within a budget."""

    name: str
    title: str
    source: str
    rules: Callable[[Setting], tuple[Rule, ...]]
    needs_company: bool = False


def strategy(name: str) -> Strategy:
    """The strategy of that name; raises LeanMoeError, naming near ones, for an unknown one."""
    if name in STRATEGIES:
        return STRATEGIES[name]
    hint = did_you_mean(name, STRATEGIES, most=1)
    raise LeanMoeError(f"strategy is {name!r}: {hint}known are auto, {', '.join(STRATEGIES)}")


def _all() -> dict[str, Strategy]:
    from leanmoe.tune.strategies import methods, own

    known = (
        Strategy("uniform", "the same top-k everywhere", "arXiv 2505.03531", methods.uniform),
        Strategy(
            "bhep",
            "(b, h, e, p): experts in two straight lines over depth",
            "arXiv 2505.03531",
            methods.begin_high_end,
        ),
        Strategy(
            "threshold", "gates below a share of the best", "arXiv 2402.14800", methods.threshold
        ),
        Strategy(
            "top_p", "the smallest set with a share of the mass", "arXiv 2403.07652", methods.top_p
        ),
        Strategy("lexi", "top-k per layer from random input", "arXiv 2509.02753", methods.lexi),
        Strategy(
            "guaranteed",
            "own best, the rest from the awake",
            "arXiv 2511.02237",
            methods.guaranteed,
            needs_company=True,
        ),
        Strategy(
            "budget",
            "at most so many distinct experts",
            "arXiv 2602.07265",
            methods.budget,
            needs_company=True,
        ),
        Strategy(
            "uniform_kept",
            "the same top-k, weights of the whole top-k kept",
            "leanmoe",
            methods.uniform_kept,
        ),
        Strategy(
            "guaranteed_kept",
            "guaranteed, weights of the whole top-k kept",
            "leanmoe",
            methods.guaranteed_kept,
            needs_company=True,
        ),
        Strategy("leanmoe", "rules per layer by measured loss", "leanmoe", own.leanmoe),
    )
    return {each.name: each for each in known}


STRATEGIES: dict[str, Strategy] = _all()
