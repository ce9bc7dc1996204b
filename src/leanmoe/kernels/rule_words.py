"""Rule tables as the words that kernels read, in memory that may change between launches.

One word (int32) a field, in the order of `Word`, for each band and rule row. What a kernel must be
compiled for is apart: `TableNeeds`. Any tables within the same needs run without compiling anew.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from leanmoe.core.errors import LeanMoeError
from leanmoe.models.routers import Router
from leanmoe.plan import Rule
from leanmoe.routing import RowRule, RuleTable

NO_BUDGET = 1 << 30
NO_THRESHOLD, NO_TOP_P = 0.0, 2.0
"""No gate is below the first share of the best one, and no sum of gates reaches the second."""
ALL_EXPERTS = 0
"""The mask of a row without `experts`."""


class Word(IntEnum):
    """Where a row's fields lie; the last three hold the bits of a float32."""

    SLOTS, OWN, MARKS, MUST = range(4)
    FULL = 4
    """Slots of the whole top-k where its sum divides the weights; else 0."""
    MASK = 5
    BUDGET, PER_RANK = range(6, 8)
    """The step's: the same in all rows of a band."""
    THRESHOLD, TOP_P, RENORMALISE = range(8, 11)


WORDS = 16
"""Of a row, so that it is 64 bytes."""


@dataclass(frozen=True)
class TableNeeds:
    """What some row of some tables needs: the shapes and the branches of kernels."""

    rows: int
    slots: int
    """What a token's ids and weights are wide."""
    full: int
    masks: int
    has_threshold: bool
    has_top_p: bool
    is_batch_aware: bool
    has_total: bool
    has_per_rank: bool

    @classmethod
    def of(cls, tables: Sequence[RuleTable], router: Router, top_k: int) -> TableNeeds:
        """Of these tables: of all bands of one plan, or of several plans."""
        rules = [row.rule for table in tables for row in table.rows]
        limits = [table.step_rule for table in tables]
        return cls(
            rows=max(len(table.rows) for table in tables),
            slots=max(1, *(table.slots for table in tables)),
            full=max(full_slots(rule, router, top_k) for rule in rules),
            masks=len(_masks(tables)),
            has_threshold=any(rule.threshold is not None for rule in rules),
            has_top_p=any(rule.top_p is not None for rule in rules),
            is_batch_aware=any(rule.is_batch_aware for rule in rules),
            has_total=any(limit.budget is not None for limit in limits),
            has_per_rank=any(limit.budget_per_rank is not None for limit in limits),
        )

    @property
    def rule(self) -> Rule:
        """A rule of the same needs, `experts` apart; its values say nothing but that there are."""
        return Rule(
            self.slots,
            threshold=1.0 if self.has_threshold else None,
            top_p=1.0 if self.has_top_p else None,
            guaranteed=1 if self.is_batch_aware else None,
            budget=1 if self.has_total else None,
            budget_per_rank=1 if self.has_per_rank else None,
            renormalise=0.5 if self.full else 1.0,
        )

    def check(self, other: TableNeeds) -> None:
        """Raises LeanMoeError, naming the field, where tables of `other` needs cannot run here."""
        for name, most in vars(self).items():
            if (wanted := getattr(other, name)) > most:
                raise LeanMoeError(
                    f"these rules need {name} {wanted}: what was compiled has {name} {most}"
                )


class DeviceRules:
    """One layer's rules in a device's memory: a table for each band, and which band it is now."""

    def __init__(
        self, tables: Sequence[RuleTable], router: Router, top_k: int, experts: int,
        device: torch.device | str = "cpu", needs: TableNeeds | None = None, ranks: int = 1,
    ) -> None:  # fmt: skip
        """`needs`: more than that of the tables, for others that may be written later."""
        self._router, self._top_k, self._experts, self.ranks = router, top_k, experts, ranks
        on_ranks = [table.on(ranks) for table in tables]
        self.needs = needs or TableNeeds.of(on_ranks, router, top_k)
        with torch.inference_mode(False):
            shape = (len(tables), self.needs.rows, WORDS)
            self.words = torch.zeros(shape, dtype=torch.int32, device=device)
            """By band, rule row and `Word`."""
            mask_shape = (self.needs.masks, experts)
            self.masks = torch.ones(mask_shape, dtype=torch.int8, device=device)
            """1 for experts that remain; the first is of all."""
            self.band_1 = torch.zeros(1, dtype=torch.int32, device=device)
            """Which of the tables is in force; whoever launches writes it."""
        self.write(tables)

    def write(self, tables: Sequence[RuleTable]) -> None:
        """Other tables, one for each band, from the next launch on.

        Rows beyond a table's own are the model as trained. Raises LeanMoeError for tables that
        need more than there is.
        """
        tables = [table.on(self.ranks) for table in tables]
        if len(tables) != len(self.words):
            raise LeanMoeError(f"{len(tables)} bands of rules: there is room for {len(self.words)}")
        self.needs.check(TableNeeds.of(tables, self._router, self._top_k))
        masks = _masks(tables)
        words = [
            [
                self._row(table, table.rows[row if row < len(table.rows) else 0], masks)
                for row in range(self.needs.rows)
            ]
            for table in tables
        ]
        allowed = torch.ones((self.needs.masks, self._experts), dtype=torch.int8)
        for number, experts in enumerate(masks):
            if experts is not None:
                allowed[number] = 0
                allowed[number, list(experts)] = 1
        self.words.copy_(torch.tensor(words, dtype=torch.int32))
        self.masks.copy_(allowed)
        self._tables = tables

    def check_ranks(self, ranks: int) -> None:
        """Raises LeanMoeError unless the tables are those that so many ranks need."""
        if ranks != self.ranks:
            raise LeanMoeError(
                f"the table of rules is for {self.ranks} ranks: the experts are on {ranks}"
            )

    @property
    def table(self) -> RuleTable:
        """The table in force; waits for the device that holds the band."""
        return self._tables[int(self.band_1)]

    def _row(
        self, table: RuleTable, row: RowRule, masks: list[tuple[int, ...] | None]
    ) -> list[int]:
        rule, limits = row.rule, table.step_rule
        fields = {
            Word.SLOTS: row.slots,
            Word.OWN: row.own,
            Word.MARKS: row.marks,
            Word.MUST: row.must,
            Word.FULL: full_slots(rule, self._router, self._top_k),
            Word.MASK: masks.index(rule.experts),
            Word.BUDGET: limits.budget or NO_BUDGET,
            Word.PER_RANK: limits.budget_per_rank or NO_BUDGET,
            Word.THRESHOLD: _bits(rule.threshold or NO_THRESHOLD),
            Word.TOP_P: _bits(rule.top_p or NO_TOP_P),
            Word.RENORMALISE: _bits(rule.renormalise),
        }
        return [fields[Word(place)] if place in fields else 0 for place in range(WORDS)]


def full_slots(rule: Rule, router: Router, top_k: int) -> int:
    """Slots of the whole top-k where its sum divides a token's weights; else 0."""
    return top_k if rule.renormalise < 1 and router.normalises else 0


def _masks(tables: Sequence[RuleTable]) -> list[tuple[int, ...] | None]:
    """All experts, then the sets of remaining ones in the order in which they come."""
    sets = (row.rule.experts for table in tables for row in table.rows)
    return list(dict.fromkeys((None, *sets)))


def _bits(number: float) -> int:
    """The bits of a float32 as a whole number."""
    bits: int = struct.unpack("=i", struct.pack("=f", number))[0]
    return bits


class TokenRules(NamedTuple):
    """In the place of one rule for all tokens of a step: each token's own row of a table."""

    rules: DeviceRules
    rule_rows_BT: Tensor
    """Whole numbers, as many as the logits have tokens, on the device of the table."""


def needed(rule: Rule | TokenRules) -> Rule:
    """The rule, or one that needs what all rows do: it says which kernels run, and how compiled."""
    return rule.rules.needs.rule if isinstance(rule, TokenRules) else rule
