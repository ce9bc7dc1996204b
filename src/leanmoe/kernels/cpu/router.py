"""CPU routing: what `leanmoe.routing.route` computes, in one compiled pass over the tokens."""

from __future__ import annotations

import ctypes
import struct
from functools import cache, lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from leanmoe.kernels.cpu.threads import find_team
from leanmoe.kernels.rule_words import TokenRules, full_slots, needed
from leanmoe.models.routers import SCORINGS, Router
from leanmoe.plan import Rule
from leanmoe.routing import Routing, RowRule, RuleTable

MOST_GROUPS = 64


def route_cpu_unsupported(
    logits_BTE: Tensor, router: Router, rule: Rule | TokenRules
) -> str | None:
    """Why `route_cpu` cannot route these tokens; None if it can."""
    if logits_BTE.device.type != "cpu":
        return f"the logits are on {logits_BTE.device}"
    rule = needed(rule)
    if router.score_dtype == "logits" and logits_BTE.dtype is not torch.float32:
        return f"the family scores in {logits_BTE.dtype}"
    if rule.top_k == 0:
        return "nothing is routed"
    if router.zero_experts and rule.is_batch_aware:
        return "experts that compute nothing are the reference's alone"
    if rule.budget_per_rank is not None:
        return "budget_per_rank is the reference's alone"
    if router.groups > MOST_GROUPS:
        return f"{router.groups} groups are more than {MOST_GROUPS}"
    return None


def route_cpu(
    logits_BTE: Tensor, router: Router, top_k: int, rule: Rule | TokenRules,
    bias_E: Tensor | None = None, padding_BT: Tensor | None = None,
) -> Routing:  # fmt: skip
    """As `leanmoe.routing.route`, for what `route_cpu_unsupported` has nothing against, and with
    `TokenRules` as `leanmoe.routing.route_rows`.

    Scores may differ from torch's in the last bits, and with them the order of experts that are as
    good as equal. Equal ones: the lower id first, and so for groups. Slots come best first. A
    token whose logits are NaN gets NaN weights.
    """
    *leading, tokens, experts = logits_BTE.shape
    steps = leading[0] if leading else 1
    rows = None
    if isinstance(rule, TokenRules):
        slots, rows = rule.rules.needs.slots, rule.rule_rows_BT.to(torch.int64).contiguous()
        constants = _constants(router, rule.rules.table, top_k, experts)
    else:
        constants = _of_one_rule(router, rule, top_k, experts)
        slots = top_k if rule.top_k is None else rule.top_k
    logits = logits_BTE.to(torch.float32).contiguous()
    bias = None if bias_E is None else bias_E.to(torch.float32).contiguous()
    padding = None if padding_BT is None else padding_BT.contiguous()
    ids = torch.empty((*leading, tokens, slots), dtype=torch.int64)
    weights = torch.empty((*leading, tokens, slots), dtype=torch.float32)
    over = torch.zeros(tuple(leading), dtype=torch.bool) if constants.has_budget else None
    program = _program()
    threads = program.threads
    listed, shares = constants.listed, constants.is_batch_aware
    size = program.scratch_bytes(steps * tokens, experts, listed, threads, shares)
    scratch = torch.empty(size, dtype=torch.uint8)
    if steps * tokens:
        program.run(
            program.pack(
                logits.data_ptr(), _address(bias), _address(padding), ids.data_ptr(),
                weights.data_ptr(), _address(over), constants.rows.ctypes.data, _address(rows),
                scratch.data_ptr(), steps, tokens, experts, slots, listed, *constants.flags,
                threads, *program.team, program.entry, 0,
            )
        )  # fmt: skip
    return Routing(ids, weights, over)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


class _Constants(NamedTuple):
    """What a router and a table of rules come to in the program's terms."""

    rows: np.ndarray
    """By rule row, as route_args.py has them; the addresses in it are those of `kept`."""
    kept: list[np.ndarray]
    listed: int
    is_batch_aware: bool
    has_budget: bool
    flags: tuple[int, ...]


@lru_cache(maxsize=1024)
def _of_one_rule(router: Router, rule: Rule, top_k: int, experts: int) -> _Constants:
    return _constants(router, RuleTable((RowRule.reply(rule, top_k),)), top_k, experts)


@lru_cache(maxsize=1024)
def _constants(router: Router, table: RuleTable, top_k: int, experts: int) -> _Constants:
    kept, rows, listed = [], [], 1
    for row in table.rows:
        rule, full = row.rule, full_slots(row.rule, router, top_k)
        shares = [-1.0 if share is None else share for share in (rule.threshold, rule.top_p)]
        others = [router.normalise_epsilon, router.scaling, rule.renormalise]
        kept.append(np.array([*shares, *others], np.float32))
        addresses = [0, kept[-1].ctypes.data]
        if rule.experts is not None:
            kept.append(np.zeros(experts, np.uint8))
            kept[-1][list(rule.experts)] = 1
            addresses[0] = kept[-1].ctypes.data
        rows.append([row.slots, row.own, row.marks, row.must, full, *addresses])
        listed = max(listed, row.slots, full)
    limits = table.step_rule
    flags = (
        SCORINGS.index(router.scoring),
        int(router.normalise),
        router.groups if router.limits_groups else 1,
        router.groups_used,
        int(router.group_score == "max"),
        len(rows),
        int(table.is_batch_aware),
        limits.budget or 0,
    )
    words = np.array(rows, np.int64)
    return _Constants(words, kept, listed, table.is_batch_aware, limits.has_budget, flags)


class _Program:
    """The compiled program and how to call it."""

    def __init__(self) -> None:
        # Imported here: numba alone takes half a second, and reading a plan needs none of it.
        from leanmoe.kernels.cpu import route_args, route_program

        self.entry = route_program.entry()
        self.run = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_char_p)(self.entry)
        self.pack = struct.Struct(f"={route_args.FIELDS}q").pack
        self.scratch_bytes = lru_cache(maxsize=1024)(route_args.scratch_bytes)
        team = find_team()
        self._has_team = team is not None
        self.team = (team.parallel, team.thread_number) if team else (0, 0)

    @property
    def threads(self) -> int:
        return torch.get_num_threads() if self._has_team else 1


@cache
def _program() -> _Program:
    return _Program()
