"""What is decided before a step, in a stand-in of vLLM's engine core with a clock of its own."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from leanmoe.core.errors import LeanMoeError
from leanmoe.serve.load_control import Slo
from leanmoe.serve.tiers import BadRequestError, Tiers
from leanmoe.serve.vllm.engine_control import EngineControl
from tests.serve.test_tiers import OTHER, PLAN

NAMES = ("plan", "other")
SLO = Slo(tpot_s=0.030)


@dataclass
class Request:
    """The fields of vLLM's Request that are read."""

    request_id: str
    sampling_params: Any
    num_prompt_tokens: int
    cache_salt: str | None = None
    num_computed_tokens: int = 0
    num_output_tokens: int = 0
    arrival_time: float = field(default_factory=time.time)


class Scheduler:
    """Takes up all that wait; a step computes whole prompts, then a token each."""

    def __init__(self) -> None:
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.requests: dict[str, Request] = {}

    def schedule(self) -> Any:
        self.running += self.waiting
        self.waiting = []
        rows = {each.request_id: self._rows(each) for each in self.running}
        for each in self.running:
            each.num_computed_tokens += rows[each.request_id]
            each.num_output_tokens += 1
        return SimpleNamespace(
            num_scheduled_tokens=rows, total_num_scheduled_tokens=sum(rows.values())
        )

    def _rows(self, request: Request) -> int:
        return max(1, request.num_prompt_tokens - request.num_computed_tokens)


class Core:
    def __init__(self, executor: str = "mp", ranks: int = 1, data_ranks: int = 1) -> None:
        parallel = SimpleNamespace(
            pipeline_parallel_size=1,
            distributed_executor_backend=executor,
            world_size=ranks,
            data_parallel_size=data_ranks,
        )
        self.vllm_config = SimpleNamespace(parallel_config=parallel)
        self.scheduler = Scheduler()

    def preprocess_add_request(self, request: Any) -> tuple[Request, int]:
        return request, 0

    def add(self, name: str, tier: Any = None, prompt: int = 10, salt: str | None = None) -> Any:
        arguments = None if tier is None else {"leanmoe_tier": tier}
        parameters = SimpleNamespace(extra_args=arguments)
        request, _ = self.preprocess_add_request(Request(name, parameters, prompt, salt))
        self.scheduler.waiting.append(request)
        self.scheduler.requests[name] = request
        return request


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def attached(slo: Slo | None = None, own: str | None = None) -> tuple[Any, EngineControl, Clock]:
    core, clock = Core(), Clock()
    control = EngineControl(Tiers((PLAN, OTHER), own), NAMES, slo, clock=clock)
    control.attach(core)
    return core, control, clock


def steps(core: Any, clock: Clock, count: int, seconds: float) -> list[Any]:
    found = []
    for _ in range(count):
        found.append(core.scheduler.schedule())
        clock.now_s += seconds
    return found


def test_each_step_says_what_it_runs_under_and_a_level_comes_and_goes_with_the_load(
    caplog: pytest.LogCaptureFixture,
) -> None:
    core, control, clock = attached(SLO)
    core.add("own")
    core.add("kept", "strict")
    core.add("fast", "fast")
    with caplog.at_level("INFO", logger="vllm.leanmoe"):
        assert {each.leanmoe for each in steps(core, clock, 100, 0.010)} == {(0, 0)}
        slow = [each.leanmoe for each in steps(core, clock, 200, 0.040)]
        assert slow[0] == (0, 0)
        assert slow[-1] == (0, 3), "careful -> usual -> fast"
        assert sorted(set(slow)) == [(0, 0), (0, 2), (0, 3)]
        assert steps(core, clock, 5000, 0.010)[-1].leanmoe == (0, 0)
    assert [r.getMessage().split(": ")[1] for r in caplog.records] == [
        "level careful -> usual", "level usual -> fast",
        "level fast -> usual", "level usual -> careful",
    ]  # fmt: skip
    assert "tpot is at 8" in caplog.records[0].getMessage()
    state = control.state()
    assert (state["level"], state["changes"]) == ("careful", 4)
    assert state["reply_tokens"] == {"careful": 5300, "strict": 5300, "fast": 5300}
    assert 0 < state["degraded_tokens"]["careful"] < 5300
    assert set(state["degraded_tokens"]) == {"careful"}, "strict and fast got what they asked for"


def test_without_a_limit_load_changes_nothing() -> None:
    core, control, clock = attached()
    core.add("own")
    assert {each.leanmoe for each in steps(core, clock, 300, 0.5)} == {(0, 0)}
    assert control.state()["changes"] == 0


def test_a_queue_that_grows_old_raises_the_level() -> None:
    core, control, clock = attached(Slo(ttft_s=0.5))
    core.add("own")
    steps(core, clock, 3, 0.01)
    late = core.add("late")
    late.arrival_time -= 0.45
    core.scheduler.schedule()
    assert control.state()["level"] == "usual"


def test_only_reply_rows_are_counted() -> None:
    core, control, clock = attached()
    core.add("own", prompt=10)
    steps(core, clock, 3, 0.01)
    assert control.state()["reply_tokens"] == {"careful": 3}, "the prompt's last row, two replies"


def test_salts_keep_tiers_and_plans_apart() -> None:
    core, _control, _ = attached()
    own, strict = core.add("a"), core.add("b", "strict")
    assert own.cache_salt is None
    assert strict.cache_salt.startswith("leanmoe-")
    assert core.add("c", salt="mine").cache_salt == "mine"
    assert core.leanmoe_change_plan("other")["epoch"] == 1
    assert core.add("d").cache_salt != own.cache_salt
    with pytest.raises(BadRequestError):
        core.add("e", "economy")


def test_a_plan_is_changed_from_the_next_step_on_and_by_name_alone() -> None:
    core, control, _clock = attached()
    core.add("own")
    assert core.scheduler.schedule().leanmoe == (0, 0)
    assert core.leanmoe_change_plan("other")["plan"] == "other"
    assert core.scheduler.schedule().leanmoe == (1, 0)
    assert core.leanmoe_change_plan("other")["epoch"] == 1, "it is at work"
    with pytest.raises(LeanMoeError, match=r"'best' is not known: .*known are plan, other"):
        core.leanmoe_change_plan("best")
    assert core.leanmoe_control() == control.state()


def test_an_engine_in_which_it_cannot_work_is_refused() -> None:
    control = EngineControl(Tiers((PLAN,)), ("plan",), SLO)
    with pytest.raises(LeanMoeError, match="external_launcher"):
        control.attach(Core("external_launcher", ranks=2))
    control.attach(Core("external_launcher"))
    sharing = EngineControl(Tiers((PLAN, OTHER)), NAMES, cross_rank=True)
    sharing.attach(Core())
    with pytest.raises(LeanMoeError, match="set LEANMOE_BATCH_SCOPE=rank"):
        sharing.attach(Core(data_ranks=2))
    lacking = Core()
    del lacking.scheduler.running
    with pytest.raises(LeanMoeError, match="Scheduler has no running"):
        control.attach(lacking)
    with pytest.raises(LeanMoeError, match="--slo needs a faster level"):
        EngineControl(Tiers((PLAN,), "fast"), ("plan",), SLO)
