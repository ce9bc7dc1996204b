"""Tiers, cache salts and load control in vLLM's processes: all that is decided before a step.

In the API process a request's tier is checked. In the engine core the salt of its cached blocks is
made, and each step is told which plan and level it runs under: that is decided in the batch it is
for, and reaches all workers as a part of it. Read in vLLM 0.32.0: `v1/engine/input_processor.py`,
`v1/engine/core.py`, `v1/core/sched/scheduler.py`.
"""

from __future__ import annotations

import functools
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from leanmoe.core.errors import LeanMoeError, unknown_name
from leanmoe.serve.load_control import Load, LoadControl, Slo
from leanmoe.serve.tiers import StepChoice, Tier, Tiers
from leanmoe.serve.vllm.rule_rows import CHOICE

logger = logging.getLogger("vllm.leanmoe")
TIER = "leanmoe_tier"
"""The attribute of vLLM's Request that holds its `Tier`."""
STATE, CHANGE = "leanmoe_control", "leanmoe_change_plan"
"""Methods of the engine core that the API process calls by name."""
NEEDED = {
    "scheduler": ("schedule", "waiting", "running", "requests"),
    "core": ("scheduler", "preprocess_add_request", "vllm_config"),
}


class EngineControl:
    """What one engine core serves: the plan at work, the level that load asks for, and counts."""

    def __init__(
        self,
        tiers: Tiers,
        names: tuple[str, ...],
        slo: Slo | None = None,
        cross_rank: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`names` are what a change calls the plans of `tiers`; `cross_rank` is the options'."""
        self._cross_rank = cross_rank
        self._tiers, self._names, self._clock = tiers, names, clock
        self._control = None if slo is None else LoadControl(slo, len(tiers.faster))
        self._choice = StepChoice()
        self._epoch = self._changes = 0
        self._replies: Counter[str] = Counter()
        self._degraded: Counter[str] = Counter()
        self._scheduler: Any = None
        self._stages = 1
        self._began_s: float | None = None
        """When the last step was made, if it had rows."""

    def attach(self, core: Any) -> None:
        """Puts itself around an engine core's methods; refuses one in which it cannot work."""
        self._check(core)
        self._scheduler = core.scheduler
        self._stages = core.vllm_config.parallel_config.pipeline_parallel_size
        preprocess, schedule = core.preprocess_add_request, core.scheduler.schedule

        @functools.wraps(preprocess)
        def add(request: Any) -> Any:
            tier = self._salt(request)
            added = preprocess(request)
            setattr(added[0], TIER, tier)
            return added

        @functools.wraps(schedule)
        def step(*arguments: Any, **keywords: Any) -> Any:
            self._decide()
            output = schedule(*arguments, **keywords)
            setattr(output, CHOICE, tuple(self._choice))
            self._count(output)
            return output

        core.preprocess_add_request, core.scheduler.schedule = add, step
        setattr(core, STATE, self.state)
        setattr(core, CHANGE, self.change_plan)

    def _check(self, core: Any) -> None:
        for owner, name in ((core, "core"), (getattr(core, "scheduler", None), "scheduler")):
            for needed in NEEDED[name]:
                if not hasattr(owner, needed):
                    raise LeanMoeError(
                        f"vLLM's {type(owner).__name__} has no {needed}: tiers cannot run there; "
                        "install a version that leanmoe ran with, or unset LEANMOE_PLAN"
                    )
        parallel = core.vllm_config.parallel_config
        is_apart = parallel.distributed_executor_backend == "external_launcher"
        if self._control is not None and is_apart and parallel.world_size > 1:
            raise LeanMoeError(
                "with external_launcher each process schedules by its own clock, so that ranks "
                "would run one step at two levels: unset LEANMOE_SLO"
            )
        may_change = self._control is not None or len(self._names) > 1
        if may_change and self._cross_rank and parallel.data_parallel_size > 1:
            raise LeanMoeError(
                "data-parallel ranks change levels and plans each at its own step, so that rules "
                "would differ among tokens that share experts: set LEANMOE_BATCH_SCOPE=rank"
            )

    def _salt(self, request: Any) -> Tier:
        """Keeps a request's cached blocks apart from those of other rules; returns its tier."""
        tier = tier_of(self._tiers, request)
        plan = self._choice.plan
        request.cache_salt = self._tiers.salt(tier, request.cache_salt, plan, self._epoch)
        return tier

    def _decide(self) -> None:
        """The level of the step that is about to be made."""
        if self._control is None:
            return
        change = self._control.step(self._load())
        if change is not None:
            before, level = self._choice.level, self._tiers.faster[change.after]
            self._choice = self._choice._replace(level=level)
            self._changes += 1
            shown = [self._level_name(each) for each in (before, level)]
            logger.info("leanmoe: level %s -> %s: %s", *shown, change.why)

    def _load(self) -> Load:
        """What the scheduler knows before a step.

        A request that runs before a step ran in the last one, too, unless its pipeline has other
        stages: the time since then is that of a token of its reply.
        """
        now_s, scheduler = self._clock(), self._scheduler
        step_s = None
        if self._began_s is not None and scheduler.running:
            step_s = (now_s - self._began_s) * self._stages
        self._began_s = now_s
        came = min((each.arrival_time for each in self._unanswered()), default=None)
        oldest_s = 0.0 if came is None else max(0.0, time.time() - came)
        return Load(now_s, len(scheduler.waiting), len(scheduler.running), step_s, oldest_s)

    def _unanswered(self) -> Iterator[Any]:
        """Requests without a first token: those that run, and the first of those that wait."""
        yield from (each for each in self._scheduler.running if not each.num_output_tokens)
        waiting = (each for each in self._scheduler.waiting if not each.num_output_tokens)
        if (first := next(waiting, None)) is not None:
            yield first

    def _count(self, output: Any) -> None:
        """Counts the step's reply rows by tier, and those served at a faster level than theirs."""
        if not output.total_num_scheduled_tokens:
            self._began_s = None
        for name, rows in output.num_scheduled_tokens.items():
            request = self._scheduler.requests[name]
            # vLLM has counted this step's rows among the computed ones by now.
            replies = min(rows, request.num_computed_tokens - request.num_prompt_tokens + 1)
            tier: Tier | None = getattr(request, TIER, None)
            if tier is None or replies <= 0:
                continue
            self._replies[tier.name] += replies
            if tier.replies(self._choice.level) != tier.level:
                self._degraded[tier.name] += replies

    def change_plan(self, name: str) -> dict[str, Any]:
        """Puts another plan of the family to work from the next step on."""
        if name not in self._names:
            raise unknown_name("the plan", name, self._names, " (those given to --plan at start)")
        plan = self._names.index(name)
        if plan != self._choice.plan:
            before = self._names[self._choice.plan]
            self._choice = self._choice._replace(plan=plan)
            self._epoch += 1
            logger.info("leanmoe: plan %s -> %s: asked for", before, name)
        return self.state()

    def state(self) -> dict[str, Any]:
        """What is served now and what was, as JSON values."""
        return {
            "plan": self._names[self._choice.plan],
            "plans": list(self._names),
            "epoch": self._epoch,
            "level": self._level_name(self._choice.level),
            "changes": self._changes,
            "reply_tokens": dict(self._replies),
            "degraded_tokens": dict(self._degraded),
        }

    def _level_name(self, level: int) -> str:
        """A level's name; the own tier's where load asks for none."""
        return self._tiers.levels[level - 1] if level else self._tiers.default.name


def tier_of(tiers: Tiers, request: Any) -> Tier:
    """The tier of one of vLLM's requests; raises BadRequestError for one that is not known."""
    parameters = request.sampling_params
    return tiers.asked(None if parameters is None else parameters.extra_args)
