"""Tiers: the level that a request asks for, and the one that it is served at; needs no engine.

A request names its tier: a level of the plan, `full` (the model as it was trained) or `strict`. One
that names none gets the server's own tier. Under load the replies of all tiers but `strict` may be
served at a faster level. Prompts are not: the key-value cache that a prompt makes is its tier's,
whatever the load was. A server of several plans has one of them at work at a time, and can change
it; the levels of all are numbered in one row, so that a change is a change of numbers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

from leanmoe.core.errors import LeanMoeError, shown
from leanmoe.core.schema import to_json
from leanmoe.plan import Plan
from leanmoe.serve.plugin_options import PluginOptions, plan_paths, without

KEY = "leanmoe_tier"
"""The name of the request's field: in OpenAI's API in `vllm_xargs`, offline in `extra_args`."""
STRICT, FULL = "strict", "full"
"""Tiers that need no level: the model as it was trained, whatever the load, and while it allows."""
MARK = "leanmoe-"
"""What leanmoe's part of a cache salt begins with; a client's own salt may not hold it."""
DIGITS = 16
"""Hexadecimal digits of a tier's digest in a cache salt."""


class BadRequestError(LeanMoeError, ValueError):
    """A request that cannot be served; a ValueError is HTTP 400 in most servers."""


class StepChoice(NamedTuple):
    """What one step runs under, decided where the step is made; it travels with the step."""

    plan: int = 0
    """Which of the server's plans is at work."""
    level: int = 0
    """The level that load asks for, counted from 1 in that plan; 0 where it asks for none."""


@dataclass(frozen=True)
class Tier:
    """What a request asks for."""

    name: str
    level: int
    """Counted from 1 in the plan at work; 0 is the model as it was trained."""
    may_degrade: bool = True

    def replies(self, load_level: int) -> int:
        """The level of its replies while load asks for `load_level`: never a more careful one."""
        return max(self.level, load_level) if self.may_degrade else self.level


@dataclass(frozen=True)
class Tiers:
    """The plans of a server and the tiers that requests may name."""

    plans: tuple[Plan, ...]
    """They differ in rules alone; the first is at work at start."""
    own: str | None = None
    """The tier of a request that names none; None: the plan's most careful level, if it has one."""
    are_open: bool = True
    """Whether requests may name others; where they are not, rules may run as constants."""

    def __post_init__(self) -> None:
        """Raises LeanMoeError for plans that are of no one family, and for an unknown own tier."""
        names = self.levels
        for plan in self.plans[1:]:
            if (other := tuple(level.name for level in plan.levels)) != names:
                raise LeanMoeError(
                    f"one plan has the levels {', '.join(names)}, another {', '.join(other)}: "
                    "plans that a server changes between must have the same"
                )
            plan.check(self.plans[0].model, more_experts=True)
        if self.own not in (None, FULL, *names):
            raise LeanMoeError(
                f"--level is {shown(self.own)}: it must be one of {', '.join((FULL, *names))}"
            )

    @property
    def levels(self) -> tuple[str, ...]:
        """The names of the levels, the most careful first."""
        return tuple(level.name for level in self.plans[0].levels)

    @cached_property
    def _tiers(self) -> dict[str, Tier]:
        named = {name: Tier(name, number) for number, name in enumerate(self.levels, start=1)}
        return {STRICT: Tier(STRICT, 0, may_degrade=False), FULL: Tier(FULL, 0), **named}

    @property
    def default(self) -> Tier:
        """The tier of a request that names none."""
        first = self.levels[0] if self.levels else FULL
        return self._tiers[first if self.own is None else self.own]

    def asked(self, arguments: Mapping[str, Any] | None) -> Tier:
        """The tier that a request's extra arguments name; or else raises BadRequestError."""
        name = None if arguments is None else arguments.get(KEY)
        if name is None:
            return self.default
        tier = self._tiers.get(name) if isinstance(name, str) else None
        if not self.are_open and tier != self.default:
            raise BadRequestError(
                f"{KEY} is {shown(name)}: this server has no tiers; --tiers starts it with them"
            )
        if tier is None:
            raise BadRequestError(
                f"{KEY} is {shown(name)}: it must be one of {', '.join(self._tiers)}"
            )
        return tier

    @cached_property
    def family(self) -> Plan:
        """All plans' levels as those of one, which is what an engine makes ready at start.

        Where there are several, what was proven of each is left out: the order is no longer from
        careful to fast.
        """
        if len(self.plans) == 1:
            return self.plans[0]
        levels = [
            replace(level, name=level.name if not number else f"plan{number}-{place}", proof=None)
            for number, plan in enumerate(self.plans)
            for place, level in enumerate(plan.levels)
        ]
        return replace(self.plans[0], levels=tuple(levels))

    def numbers(self, tier: Tier, choice: StepChoice) -> tuple[int, int]:
        """The levels of a request's prompt and of its replies, counted from 1 in the family."""

        def number(level: int) -> int:
            return choice.plan * len(self.levels) + level if level else 0

        return number(tier.level), number(tier.replies(choice.level))

    def levels_of(self, parameters: Any, choice: tuple[int, ...]) -> tuple[int, int]:
        """The same of a request's parameters (vLLM's SamplingParams, or None)."""
        asked = None if parameters is None else parameters.extra_args
        return self.numbers(self.asked(asked), StepChoice(*choice))

    @property
    def faster(self) -> tuple[int, ...]:
        """The levels that load may ask for, from the own tier's on; 0 stands for none asked."""
        return (0, *range(self.default.level + 1, len(self.levels) + 1))

    def salt(self, tier: Tier, client: str | None, plan: int = 0, epoch: int = 0) -> str | None:
        """The cache salt of a request: cached blocks are read where salts are equal alone.

        The client's own stays as it is for the own tier of the plan that was at work at start.
        Raises BadRequestError for a salt that could be taken for leanmoe's.
        """
        if client is not None and MARK in client:
            raise BadRequestError(
                f"cache_salt holds {MARK!r}, which leanmoe's own salts begin with"
            )
        if tier == self.default and not epoch:
            return client
        level = self.plans[plan].levels[tier.level - 1] if tier.level else None
        rules = [] if level is None else [to_json(level.bands), to_json(level.prompt)]
        text = json.dumps([rules, tier.may_degrade, epoch], sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:DIGITS]
        return f"{client or ''}{MARK}{digest}"


def tiers_of(options: PluginOptions) -> Tiers:
    """What requests may ask for; raises LeanMoeError for plans that are of no one family."""
    plans = [without(Plan.load(path), options.drop) for path in plan_paths(options.path)]
    if options.has_tiers:
        return Tiers(tuple(plans), options.level)
    return Tiers((plans[0].at(options.level),), are_open=False)
