"""Rules as data: what each rule row of a table says, and how that follows from a token's role.

Every token of a step names a row of the table. Row 0 is the model as it was trained. The data need
no torch; `leanmoe.routing.route_rows` says what they mean.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from leanmoe.core.errors import LeanMoeError
from leanmoe.plan import Rule

TRAINED = 0
"""The row of the model as trained; a number that is no row of the table means this one."""


@dataclass(frozen=True)
class RowRule:
    """A rule as the tokens of one rule row are under it, beside tokens of others."""

    rule: Rule
    slots: int
    """Experts a token may use at most; 0 for none."""
    own: int
    """How many of its best slots a token keeps, whoever else is active."""
    marks: int
    """How many of its best slots it activates for others to use. With none it has no vote."""
    must: int
    """How many of its best slots a budget may not drop."""

    def __post_init__(self) -> None:
        """Raises LeanMoeError for numbers that no slots could have."""
        if not 0 <= self.must <= self.marks <= self.slots >= self.own >= 0:
            raise LeanMoeError(
                f"a rule row has own {self.own}, marks {self.marks} and must {self.must} of "
                f"{self.slots} slots: must is at most marks, and none is more than the slots"
            )

    @classmethod
    def trained(cls, top_k: int) -> RowRule:
        """The model's own top-k, whoever shares the step."""
        return cls.reply(Rule(), top_k)

    @classmethod
    def reply(cls, rule: Rule, top_k: int) -> RowRule:
        """A token whose prediction somebody reads.

        Under a rule of tokens alone it keeps all its slots, and others may use them. Under
        `guaranteed` (OEA, arXiv 2511.02237) it keeps and activates that many. A budget (XShare,
        arXiv 2602.07265) may drop all but its best.
        """
        slots = top_k if rule.top_k is None else rule.top_k
        marks = slots if rule.guaranteed is None else min(rule.guaranteed, slots)
        sure = min(1, slots) if rule.has_budget else marks
        return cls(rule, slots, own=sure, marks=marks, must=sure)

    @classmethod
    def prompt(cls, rule: Rule, top_k: int, where: str = "prompt") -> RowRule:
        """A token whose prediction nobody reads: it keeps its slots, and no other may use them."""
        if rule.is_batch_aware:
            fields = ("guaranteed", "budget", "budget_per_rank")
            name = next(name for name in fields if getattr(rule, name) is not None)
            raise LeanMoeError(
                f"{where}.{name} is {getattr(rule, name)}: prompt tokens share no experts in a "
                f"table of rules; it must be left out"
            )
        slots = top_k if rule.top_k is None else rule.top_k
        return cls(rule, slots, own=slots, marks=0, must=0)


@dataclass(frozen=True)
class RuleTable:
    """One MoE layer's rule rows, for the steps of one band."""

    rows: tuple[RowRule, ...]

    @classmethod
    def of(cls, top_k: int, levels: Iterable[tuple[Rule, Rule | None]]) -> RuleTable:
        """The model as trained, then for each level a row of reply tokens and one of prompt tokens.

        `levels` are pairs of a reply rule and a prompt rule; without the latter prompt tokens are
        as any other. Level i, from 1, has the rows 2i - 1 and 2i.
        """
        rows = [RowRule.trained(top_k)]
        for number, (reply, prompt) in enumerate(levels, start=1):
            rows.append(RowRule.reply(reply, top_k))
            rows.append(
                RowRule.reply(reply, top_k)
                if prompt is None
                else RowRule.prompt(prompt, top_k, f"levels[{number}].prompt")
            )
        return cls(tuple(rows))

    def on(self, ranks: int) -> RuleTable:
        """The table as that many ranks need it: see `Rule.on`."""
        return RuleTable(
            tuple(
                RowRule(row.rule.on(ranks), row.slots, row.own, row.marks, row.must)
                for row in self.rows
            )
        )

    @property
    def slots(self) -> int:
        """The most slots of any row."""
        return max(row.slots for row in self.rows)

    @property
    def is_batch_aware(self) -> bool:
        """Whether the experts of some row's tokens depend on the other tokens in a step."""
        return any(row.rule.is_batch_aware for row in self.rows)

    @property
    def step_rule(self) -> Rule:
        """What limits the experts that a step activates: its budgets, and whether a vote is not
        enough but some token must guarantee an expert (then `guaranteed` is set).

        The budget is the largest that a row asks for, whichever rows are in the step: so nobody
        has fewer active experts than among its like. One row without a budget of the kind, beside
        one with it, leaves the step without.
        """
        budgeted = [row.rule for row in self.rows if row.rule.has_budget]
        total = _largest([rule.budget for rule in budgeted])
        per_rank = _largest([rule.budget_per_rank for rule in budgeted])
        needs_mark = any(
            row.rule.guaranteed is not None or 0 < row.marks < row.slots for row in self.rows
        )
        return Rule(guaranteed=1 if needs_mark else None, budget=total, budget_per_rank=per_rank)


def _largest(budgets: Sequence[int | None]) -> int | None:
    """None, no limit, is larger than any."""
    limits = [budget for budget in budgets if budget is not None]
    return max(limits) if limits and len(limits) == len(budgets) else None
