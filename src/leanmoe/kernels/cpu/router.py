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
from leanmoe.kernels.rule_words import TokenRules
from leanmoe.models.routers import SCORINGS, Router
from leanmoe.plan import Rule
from leanmoe.routing import Routing

MOST_GROUPS = 64


def route_cpu_unsupported(
    logits_BTE: Tensor, router: Router, rule: Rule | TokenRules
) -> str | None:
    """Why `route_cpu` cannot route these tokens; None if it can."""
    if logits_BTE.device.type != "cpu":
        return f"the logits are on {logits_BTE.device}"
    if isinstance(rule, TokenRules):
        return "tables of rules are the reference's alone"
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
    logits_BTE: Tensor, router: Router, top_k: int, rule: Rule, bias_E: Tensor | None = None,
    padding_BT: Tensor | None = None,
) -> Routing:  # fmt: skip
    """As `leanmoe.routing.route`, for what `route_cpu_unsupported` has nothing against.

    Scores may differ from torch's in the last bits, and with them the order of experts that are as
    good as equal. Equal ones: the lower id first, and so for groups. Slots come best first. A
    token whose logits are NaN gets NaN weights.
    """
    *leading, tokens, experts = logits_BTE.shape
    steps = leading[0] if leading else 1
    slots = top_k if rule.top_k is None else rule.top_k
    logits = logits_BTE.to(torch.float32).contiguous()
    bias = None if bias_E is None else bias_E.to(torch.float32).contiguous()
    padding = None if padding_BT is None else padding_BT.contiguous()
    full = top_k if rule.renormalise < 1 and router.normalises else 0
    listed = max(slots, full)
    constants = _constants(router, rule, experts)
    ids = torch.empty((*leading, tokens, slots), dtype=torch.int64)
    weights = torch.empty((*leading, tokens, slots), dtype=torch.float32)
    over = None if rule.budget is None else torch.zeros(tuple(leading), dtype=torch.bool)
    program = _program()
    threads = program.threads
    size = program.scratch_bytes(steps * tokens, experts, listed, threads, rule.is_batch_aware)
    scratch = torch.empty(size, dtype=torch.uint8)
    if steps * tokens:
        program.run(
            program.pack(
                logits.data_ptr(), _address(bias),
                0 if constants.allowed is None else constants.allowed.ctypes.data,
                _address(padding), ids.data_ptr(), weights.data_ptr(), _address(over),
                constants.numbers.ctypes.data, scratch.data_ptr(),
                steps, tokens, experts, slots, full, listed, *constants.flags,
                threads, *program.team, program.entry, 0,
            )
        )  # fmt: skip
    return Routing(ids, weights, over)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


class _Constants(NamedTuple):
    """What a router and a rule come to in the program's terms."""

    numbers: np.ndarray
    allowed: np.ndarray | None
    flags: tuple[int, ...]


@lru_cache(maxsize=1024)
def _constants(router: Router, rule: Rule, experts: int) -> _Constants:
    shares = [-1.0 if share is None else share for share in (rule.threshold, rule.top_p)]
    others = [router.normalise_epsilon, router.scaling, rule.renormalise]
    numbers = np.array([*shares, *others], np.float32)
    allowed = None
    if rule.experts is not None:
        allowed = np.zeros(experts, np.uint8)
        allowed[list(rule.experts)] = 1
    flags = (
        SCORINGS.index(router.scoring),
        int(router.normalise),
        router.groups if router.limits_groups else 1,
        router.groups_used,
        int(router.group_score == "max"),
        rule.guaranteed or 0,
        rule.budget or 0,
    )
    return _Constants(numbers, allowed, flags)


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
