"""Load control: which of a plan's levels is served now, so that latency stays within its limits.

One `LoadControl` is asked in each step of a scheduler, before the step is made. It goes up one
level when a limit is in danger, and comes back one when it is not. It needs no engine and no clock:
time is a part of what it is told. Of levels it knows their number alone; whoever asks gives it
proven ones, from the most careful to the fastest.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from leanmoe.core.errors import LeanMoeError, shown

UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
LIMITS = {"tpot": "the time per output token", "ttft": "the time to the first token"}
LONGEST_S = 3600.0
"""No limit is longer than an hour: more is a wrong unit."""
_TERM = re.compile(r"(?P<name>[a-z]+)=(?P<number>[0-9]+(\.[0-9]+)?)(?P<unit>[a-z]*)")
_EXAMPLE = "write it like tpot=30ms,ttft=500ms"


@dataclass(frozen=True)
class Slo:
    """Limits of latency that a server is to hold, in seconds; None is no limit."""

    tpot_s: float | None = None
    ttft_s: float | None = None

    @classmethod
    def parse(cls, text: str) -> Slo:
        """Reads `tpot=30ms,ttft=500ms`; raises LeanMoeError that names what is wrong."""
        limits: dict[str, float] = {}
        for term in text.split(","):
            match = _TERM.fullmatch(term.strip())
            if match is None:
                raise LeanMoeError(f"--slo has {shown(term)}: {_EXAMPLE}")
            name, unit = match["name"], match["unit"]
            if name not in LIMITS:
                raise LeanMoeError(f"--slo limits {name!r}: it must be {' or '.join(LIMITS)}")
            if name in limits:
                raise LeanMoeError(f"--slo limits {name} twice")
            if unit not in UNITS:
                said = repr(unit) if unit else "no unit"
                raise LeanMoeError(f"--slo has {term!r}, {said}: it must be {', '.join(UNITS)}")
            seconds = float(match["number"]) * UNITS[unit]
            if not 0 < seconds <= LONGEST_S:
                raise LeanMoeError(f"--slo has {term!r}: it must be above 0 and at most an hour")
            limits[name] = seconds
        return cls(limits.get("tpot"), limits.get("ttft"))

    def pressure(self, tpot_s: float, ttft_s: float) -> tuple[float, str]:
        """How much of a limit is used, 1 is all of it, and of which: the one that is used most."""
        shares = [(tpot_s / self.tpot_s, "tpot")] if self.tpot_s is not None else []
        shares += [(ttft_s / self.ttft_s, "ttft")] if self.ttft_s is not None else []
        return max(shares, default=(0.0, ""))


@dataclass(frozen=True)
class ControlSettings:
    """How the control decides; each default with its reason."""

    raise_at: float = 0.85
    """The share of a limit from which it is in danger. What is measured lags behind, and steps
    differ: a limit that is met on average is broken half the time."""
    lower_at: float = 0.6
    """The share below which a limit is safe. The level that comes back is slower, so there must be
    room for what is given up: few levels gain more than 0.85 / 0.6."""
    smoothing_s: float = 1.0
    """Over how long step times are averaged: many decode steps, and a few prompts among them."""
    raise_dwell_s: float = 2.0
    """The least time from any change to one upwards: twice the averaging, so that the level at
    work is judged and not the one before it."""
    lower_dwell_s: float = 10.0
    """How long a limit must be safe before a level is left. Longer costs quality in vain, shorter
    makes more changes."""
    longest_dwell_s: float = 640.0
    """Each return that did not last doubles the wait for the next, up to this: so changes grow rare
    at a constant load between two levels, whatever a level gains."""
    other_load: float = 0.5
    """The share of the requests at the last return that failed, below which the load is another
    one: then the wait is the first again."""

    def __post_init__(self) -> None:
        """Raises LeanMoeError for settings under which a level could not settle."""
        if not 0 < self.lower_at < self.raise_at <= 1:
            raise LeanMoeError(
                f"load control raises at {self.raise_at} and lowers at {self.lower_at}: both must "
                "be above 0 and at most 1, the second below the first"
            )
        times = (self.smoothing_s, self.raise_dwell_s, self.lower_dwell_s)
        if not all(0 < each <= self.longest_dwell_s < math.inf for each in times):
            raise LeanMoeError(
                f"load control's times are {times}: each must be above 0 and at most "
                f"{self.longest_dwell_s}"
            )


@dataclass(frozen=True)
class Load:
    """What a scheduler knows before a step; times are in seconds."""

    now_s: float
    """A clock that never goes back."""
    waiting: int
    """Requests that no step has taken up."""
    running: int
    """Requests that steps work on."""
    step_s: float | None
    """How long the last step took, so what a token of a reply took; None where none ran."""
    oldest_s: float
    """For how long the oldest request without a first token has waited; 0 where there is none."""


@dataclass(frozen=True)
class Change:
    """One change of the served level, and why."""

    before: int
    after: int
    why: str


class LoadControl:
    """The served level of a server by its load: 0 is the most careful of `levels`."""

    def __init__(self, slo: Slo, levels: int, settings: ControlSettings | None = None) -> None:
        """Raises LeanMoeError where there is nothing to choose from, or no limit to hold."""
        if levels < 2:
            raise LeanMoeError("--slo needs a faster level than the one that is served: none is")
        if slo == Slo():
            raise LeanMoeError(f"--slo has no limit: {_EXAMPLE}")
        self.slo, self.levels = slo, levels
        self.settings = settings or ControlSettings()
        self.level = 0
        self._forget(-math.inf)

    def _forget(self, now_s: float) -> None:
        """Begins as if there had been no load before."""
        self._step_s = self._requests = 0.0
        self._last_s, self._changed_s = now_s, -math.inf
        self._safe_since_s = math.inf
        self._dwell_s = self.settings.lower_dwell_s
        self._left_s, self._left_with = -math.inf, 0.0
        """When a level was last left, and with how many requests."""
        self._failed_with = 0.0
        """With how many requests a level was last left too early."""

    def step(self, load: Load) -> Change | None:
        """Takes in the load before a step; returns the change of level that it makes, if any."""
        before = self.level
        passed_s = 0.0 if self._last_s == -math.inf else load.now_s - self._last_s
        if load.step_s is None and passed_s >= self.settings.lower_dwell_s:
            return self._rest(load.now_s)
        self._average(load, passed_s)
        # A first token that is not there yet comes with the end of this step at best.
        ttft_s = load.oldest_s + self._step_s if load.oldest_s else 0.0
        pressure, limit = self.slo.pressure(self._step_s, ttft_s)
        since_s = load.now_s - self._changed_s
        if pressure >= self.settings.lower_at:
            self._safe_since_s = math.inf
        elif self._safe_since_s == math.inf:
            self._safe_since_s = load.now_s
        if pressure >= self.settings.raise_at:
            if self.level + 1 < self.levels and since_s >= self.settings.raise_dwell_s:
                self._raise(load.now_s)
        elif self.level and load.now_s - self._safe_since_s >= self._wait_s():
            self._lower(load.now_s)
        if self.level == before:
            return None
        found = f"{limit} is at {pressure:.0%} of its limit"
        return Change(before, self.level, f"{found}, {load.waiting} wait, {load.running} run")

    def _average(self, load: Load, passed_s: float) -> None:
        """Averages over time: the step's over the time that it took."""
        how = self.settings
        share = -math.expm1(-passed_s / how.lower_dwell_s)
        self._requests += share * (load.waiting + load.running - self._requests)
        if load.step_s is not None:
            share = -math.expm1(-load.step_s / how.smoothing_s)
            self._step_s += share * (load.step_s - self._step_s)
        self._last_s = load.now_s

    def _wait_s(self) -> float:
        """How long a limit must be safe now before a level is left."""
        if self._requests < self.settings.other_load * self._failed_with:
            self._dwell_s, self._failed_with = self.settings.lower_dwell_s, 0.0
        return self._dwell_s

    def _raise(self, now_s: float) -> None:
        if now_s - self._left_s < 2 * self._dwell_s:
            self._dwell_s = min(2 * self._dwell_s, self.settings.longest_dwell_s)
            self._failed_with = self._left_with
        elif self._left_s > -math.inf:
            self._dwell_s = self.settings.lower_dwell_s
        self.level += 1
        self._changed_s, self._left_s = now_s, -math.inf

    def _lower(self, now_s: float) -> None:
        self.level -= 1
        self._left_s, self._left_with = now_s, self._requests
        self._changed_s, self._safe_since_s = now_s, math.inf

    def _rest(self, now_s: float) -> Change | None:
        """Nothing ran for so long that what was known of the load holds no more."""
        before, passed_s = self.level, now_s - self._last_s
        self._forget(now_s)
        if before:
            self.level, self._changed_s = 0, now_s
        return Change(before, 0, f"nothing ran for {passed_s:.0f} s") if before else None
