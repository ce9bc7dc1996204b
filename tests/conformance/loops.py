"""The rules once more, as plain loops over tokens and experts: obviously right, and slow.

Works in Python floats on one step of scores; ties go to the lower id.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from leanmoe.plan import Rule

NEVER = float("-inf")
Matrix = Sequence[Sequence[float]]


@dataclass(frozen=True)
class Step:
    """What each token uses, best first, and whether the budget was too small."""

    experts: list[list[int]]
    over_budget: bool


def run(
    gates: Matrix,
    ranking: Matrix,
    slots: int,
    rule: Rule,
    padding: Sequence[bool],
    normalise: bool,
    rank_of: Sequence[int] | None = None,
    zero_experts: int = 0,
) -> Step:
    """The experts of each token under the rule; `gates` are comparable and not negative.

    `rank_of` says which rank has each expert; None for one that has all. The last `zero_experts`
    compute nothing, so that all of them are active and none counts.
    """
    orders = [sorted(range(len(row)), key=row.__getitem__, reverse=True) for row in ranking]
    usable = [
        [e for e in order if row[e] > NEVER] for order, row in zip(orders, ranking, strict=True)
    ]
    own = [
        [] if is_padding else keep(row, experts[:slots], rule)
        for row, experts, is_padding in zip(gates, usable, padding, strict=True)
    ]
    if not rule.is_batch_aware:
        return Step(own, False)

    weighted = len(gates[0]) - zero_experts if gates else 0
    active = {expert for kept in own for expert in kept if expert < weighted}
    if rule.guaranteed is not None:
        firsts = {expert for kept in own for expert in kept[: rule.guaranteed]}
        active = {expert for expert in firsts if expert < weighted}
    over_budget = False
    if rule.has_budget:
        ranks = rank_of or [0] * len(gates[0]) if gates else []
        bests = {kept[0] for kept in own if kept and kept[0] < weighted}
        active, over_budget = affordable(gates, own, active, bests, rule, normalise, ranks)
    active |= set(range(weighted, weighted + zero_experts))
    filled = []
    for kept, experts in zip(own, usable, strict=True):
        following = kept + [expert for expert in experts if expert not in kept]
        filled.append([expert for expert in following if expert in active][: len(kept)])
    return Step(filled, over_budget)


def keep(gates: Sequence[float], picked: Sequence[int], rule: Rule) -> list[int]:
    """Those of a token's picked experts that threshold and top_p leave."""
    kept = list(picked)
    if rule.threshold is not None:
        best = max(gates[expert] for expert in picked)
        kept = [expert for expert in kept if gates[expert] >= rule.threshold * best]
    if rule.top_p is None:
        return kept
    total = sum(gates[expert] for expert in picked)
    prefix: list[int] = []
    for expert in kept:
        mass = sum(gates[e] for e in prefix)
        if mass == 0 or mass < rule.top_p * total:
            prefix.append(expert)
    return prefix


def affordable(
    gates: Matrix,
    own: list[list[int]],
    candidates: set[int],
    bests: set[int],
    rule: Rule,
    normalise: bool,
    rank_of: Sequence[int],
) -> tuple[set[int], bool]:
    """Every token's best, then the most voted-for candidates while the budgets last."""
    votes: dict[int, Fraction] = {}
    for row, kept in zip(gates, own, strict=True):
        total = sum(Fraction(row[expert]) for expert in kept) or Fraction(1)
        for expert in kept:
            if expert in candidates:
                vote = Fraction(row[expert]) / (total if normalise else 1)
                votes[expert] = votes.get(expert, Fraction(0)) + vote
    active = set(bests)
    over_budget = exceeds(active, rule, rank_of)
    for expert in sorted(votes, key=lambda e: (-votes[e], e)):
        if expert not in active and has_room(active, expert, rule, rank_of):
            active.add(expert)
    return active, over_budget


def on_rank(active: set[int], rank: int, rank_of: Sequence[int]) -> int:
    return sum(rank_of[expert] == rank for expert in active)


def exceeds(active: set[int], rule: Rule, rank_of: Sequence[int]) -> bool:
    if rule.budget is not None and len(active) > rule.budget:
        return True
    most = max((on_rank(active, rank, rank_of) for rank in rank_of), default=0)
    return rule.budget_per_rank is not None and most > rule.budget_per_rank


def has_room(active: set[int], expert: int, rule: Rule, rank_of: Sequence[int]) -> bool:
    if rule.budget is not None and len(active) >= rule.budget:
        return False
    there = on_rank(active, rank_of[expert], rank_of)
    return rule.budget_per_rank is None or there < rule.budget_per_rank
