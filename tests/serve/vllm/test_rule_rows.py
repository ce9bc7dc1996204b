"""Rule rows against each row's own, said plainly; the runners are stand-ins with vLLM's names."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from leanmoe.core.errors import LeanMoeError
from leanmoe.plan import Band, Fingerprint, Plan, Rule
from leanmoe.serve.vllm.rule_rows import (
    RuleRows,
    ServedRequest,
    StepRequests,
    first_level,
    follow_v1,
    follow_v2,
    reply_row,
    row_of,
    served,
    step_rows_of,
)
from tests.serve.stand_ins import install_context

MODEL = Fingerprint("Model", 2, 2, 16, 4)
RULES = (Rule(top_k=2), Rule(top_k=3))
PLAN = Plan.banded(MODEL, (Band(2, RULES), Band(4, RULES)), prompt=(Rule(top_k=0), Rule(top_k=1)))
CPU = torch.device("cpu")
READING = SimpleNamespace(prompt_logprobs=0)
PLAIN = SimpleNamespace(prompt_logprobs=None)


@pytest.fixture(autouse=True)
def _vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    install_context(monkeypatch, None)


def step(*requests: tuple[str, int, int, int]) -> StepRequests:
    """Requests by name, rows, position of the first and length of the prompt."""
    columns = list(zip(*requests, strict=True))
    numbers = [np.array(column, dtype=np.int32) for column in columns[1:]]
    return StepRequests(columns[0], *numbers)


def scheduled(*new: tuple[str, Any], finished: tuple[str, ...] = ()) -> Any:
    """vLLM's SchedulerOutput, of requests that begin and end."""
    requests = [SimpleNamespace(req_id=name, sampling_params=one) for name, one in new]
    return SimpleNamespace(
        scheduled_new_reqs=requests, finished_req_ids=set(finished), num_scheduled_tokens={}
    )


def test_what_nobody_reads_before_the_prompts_last_token_is_a_prompt_row() -> None:
    assert [row_of(position, 4, served(PLAIN, (), first_level)) for position in range(6)] == [
        2,
        2,
        2,
        1,
        1,
        1,
    ]
    assert [row_of(position, 4, served(READING, (), first_level)) for position in range(6)] == [
        1
    ] * 6
    assert [row_of(position, 4, served(None, (), first_level)) for position in range(6)] == [1] * 6
    assert [row_of(position, 4, ServedRequest(3, 3)) for position in (2, 3)] == [6, 5]
    assert {row_of(position, 4, ServedRequest(0, 0)) for position in range(6)} == {0}
    assert [row_of(at, 4, ServedRequest(1, 3, True)) for at in range(5)] == [1, 1, 1, 5, 5]
    assert [reply_row(level) for level in range(4)] == [0, 1, 3, 5]


@given(
    st.lists(
        st.tuples(
            st.integers(1, 9), st.integers(0, 12), st.integers(1, 12), st.integers(0, 3),
            st.integers(0, 3), st.booleans(),
        ),
        min_size=1, max_size=6,
    )
)  # fmt: skip
def test_all_rows_of_a_step_are_each_rows_own(
    requests: list[tuple[int, int, int, int, int, bool]],
) -> None:
    """Chunks, replies and what a preemption computes anew are all rows at some position."""
    who = [ServedRequest(*one[3:]) for one in requests]
    rows_T, prompt_rows_S = step_rows_of(step(*(("", *one[:3]) for one in requests)), who)
    wanted = [
        [row_of(at + place, prompt, request) for place in range(rows)]
        for (rows, at, prompt, *_), request in zip(requests, who, strict=True)
    ]
    assert rows_T.tolist() == [row for rows in wanted for row in rows]
    assert rows_T.dtype == np.int32
    unread = [
        sum(at + place < prompt - 1 and not request.reads_prompt for place in range(rows))
        for (rows, at, prompt, *_), request in zip(requests, who, strict=True)
    ]
    assert prompt_rows_S.tolist() == unread


def test_rows_behind_a_step_are_those_of_the_trained_model() -> None:
    rows = RuleRows(PLAN, 8)
    rows.hear(scheduled(("a", PLAIN), ("b", READING)))
    rows.fill(step(("a", 4, 0, 5), ("b", 2, 0, 5), ("stranger", 1, 0, 5)), CPU)
    assert rows.rows(8).tolist() == [2, 2, 2, 2, 1, 1, 0, 0]
    there = rows.rows(3).data_ptr()
    rows.fill(step(("a", 2, 4, 5)), CPU)
    assert rows.rows(8).tolist() == [1, 1] + [0] * 6
    assert rows.rows(3).data_ptr() == there, "captured steps read the memory that they captured"
    assert there % 16 == rows._buffer.data_ptr() % 16  # type: ignore[union-attr]
    rows.reset(CPU)
    assert not bool(rows.rows(8).any())
    rows.hear(scheduled(finished=("a",)))
    rows.fill(step(("a", 1, 0, 5)), CPU)
    assert rows.rows(1).tolist() == [0], "a request that ended is not known"


def test_the_reply_rows_that_are_there_pick_the_band() -> None:
    rows = RuleRows(PLAN, 32)
    rows.hear(scheduled(("a", PLAIN), ("b", PLAIN)))
    bands = []
    for number in (1, 2, 3, 4, 5):
        rows.fill(step(("a", 9, 0, 20), ("b", number, 30, 20)), CPU)
        bands.append(int(rows.band(0)))
    assert bands == [0, 0, 1, 1, 2], "2 is beyond the last band"
    rows.fill(step(("a", 9, 0, 20)), CPU)
    assert int(rows.band(0)) == 0
    alike = RuleRows(Plan.banded(MODEL, PLAN.bands), 32)
    alike.hear(scheduled(("a", PLAIN)))
    alike.fill(step(("a", 9, 0, 20)), CPU)
    assert int(alike.band(0)) == 2, "without rules of their own prompt rows count"


def test_a_sequence_parallel_rank_has_its_share() -> None:
    rows = RuleRows(PLAN, 5)
    rows.hear(scheduled(("a", PLAIN)))
    rows.fill(step(("a", 5, 0, 4)), CPU)
    assert rows.rows(3, (0, 2)).tolist() == [2, 2, 2]
    assert rows.rows(3, (1, 2)).tolist() == [1, 1, 0]


def test_more_rows_than_a_step_can_have_are_refused() -> None:
    rows = RuleRows(PLAN, 4)
    with pytest.raises(LeanMoeError, match=r"computes 1 rows, but vLLM 0\.32\.0 prepared no step"):
        rows.rows(1)
    rows.reset(CPU)
    with pytest.raises(LeanMoeError, match="LEANMOE_DROP=prompt"):
        rows.rows(5)
    with pytest.raises(LeanMoeError, match="a step of 5 rows: rule rows are kept for 4"):
        rows.fill(step(("a", 5, 0, 4)), CPU)


def test_a_row_that_differs_from_the_hosts_ends_a_checked_step() -> None:
    for is_checked in (False, True):
        rows = RuleRows(PLAN, 8, is_checked=is_checked)
        rows.hear(scheduled(("a", PLAIN), ("b", PLAIN)))
        one = step(("a", 2, 3, 4), ("b", 3, 0, 9))
        rows.fill(one, CPU)
        starts, positions = torch.tensor([0, 2, 5]), torch.tensor([3, 4, 0, 1, 2, 9, 9, 9])
        rows.check(one, starts, positions)
        wrongs = [(4, positions), (6, positions)]
        for row, at in wrongs:
            rows.rows(8)[row] += 1
            if is_checked:
                with pytest.raises(LeanMoeError, match=f": row {row} of a step of 5 has rule row"):
                    rows.check(one, starts, at)
            else:
                rows.check(one, starts, at)
            rows.rows(8)[row] -= 1
        shifted = torch.tensor([0, 3, 5])
        if is_checked:
            with pytest.raises(LeanMoeError, match=r": row 2 .* but should have 1"):
                rows.check(one, shifted, torch.tensor([3, 4, 5, 0, 1, 0, 0, 0]))


@dataclass
class RunnerV1:
    """vLLM's V1 runner: what is scheduled becomes rows in the order of its batch."""

    seen: list[list[int]] = field(default_factory=list)
    rows: RuleRows | None = None
    device = CPU

    def __post_init__(self) -> None:
        self.input_batch = SimpleNamespace(
            num_reqs=2,
            req_ids=["b", "a"],
            num_computed_tokens_cpu=np.array([0, 3, 77], dtype=np.int32),
            num_prompt_tokens=np.array([3, 4, 77], dtype=np.int32),
        )
        self.query_start_loc = SimpleNamespace(gpu=torch.tensor([0, 2, 4, 4]))
        self.positions = torch.tensor([0, 1, 3, 4, 0, 0])

    def execute_model(self, scheduler_output: Any, intermediate_tensors: Any = None) -> None:
        del intermediate_tensors
        self._prepare_inputs(scheduler_output, np.array([2, 2]))
        self._run()

    def _prepare_inputs(self, scheduler_output: Any, num_scheduled_tokens: Any) -> None:
        """Of no use here."""

    def _dummy_run(self, num_tokens: int) -> None:
        del num_tokens
        self._run()

    def _run(self) -> None:
        if self.rows is not None:
            self.seen.append(self.rows.rows(5).tolist())


class States:
    """What the V2 runner knows of its requests, by slot."""

    prompt_len = SimpleNamespace(np=np.array([4, 77, 3], dtype=np.int32))


@dataclass
class RunnerV2(RunnerV1):
    """vLLM's V2 runner: a batch is an object, requests are in slots."""

    req_states = States()

    def execute_model(
        self, scheduler_output: Any, intermediate_tensors: Any = None, dummy_run: bool = False
    ) -> None:
        del intermediate_tensors
        if not dummy_run:
            self.prepare_inputs(scheduler_output, None)
        self._run()

    def prepare_inputs(self, scheduler_output: Any, batch_desc: Any) -> Any:
        del scheduler_output, batch_desc
        starts: Tensor = torch.tensor([0, 2, 4, 4])
        return SimpleNamespace(
            num_reqs=2, req_ids=["b", "a"], idx_mapping_np=np.array([2, 0]),
            num_scheduled_tokens=np.array([2, 2], dtype=np.int32),
            num_computed_tokens_np=np.array([0, 3], dtype=np.int32),
            query_start_loc=starts, positions=self.positions,
        )  # fmt: skip


@pytest.mark.parametrize("kind", [RunnerV1, RunnerV2])
def test_runners_fill_the_rows_of_real_and_dummy_steps(kind: type[RunnerV1]) -> None:
    runner_class: Any = type("GPUModelRunner", (kind,), {})
    models: list[RuleRows] = []
    follow = follow_v1 if kind is RunnerV1 else follow_v2
    follow(runner_class, lambda: models[0] if models else None)
    begins = scheduled(("a", PLAIN), ("b", PLAIN))
    begins.num_scheduled_tokens = {"a": 2, "b": 2}
    runner_class().execute_model(begins)  # no model is under a plan
    models.append(RuleRows(PLAN, 6, is_checked=True))
    runner = runner_class(rows=models[0])
    again = scheduled()
    again.num_scheduled_tokens = {"a": 2, "b": 2}
    dummies: list[Any] = [lambda: runner._dummy_run(4)]
    if kind is RunnerV2:
        dummies = [
            lambda: runner.execute_model(again, dummy_run=True),
            lambda: runner.execute_model(again, None, True),
        ]
    for dummy in dummies:
        runner.execute_model(begins)
        runner.execute_model(again)
        dummy()
        assert runner.seen == [[2, 2, 1, 1, 0], [2, 2, 1, 1, 0], [0] * 5]
        runner.seen.clear()


def test_steps_of_vllms_warm_up_run_as_trained() -> None:
    """No scheduler made them, so that nothing but their rows comes with them."""
    rows = RuleRows(PLAN, 6)
    runner_class: Any = type("GPUModelRunner", (RunnerV1,), {"execute_model": lambda *_: None})
    follow_v1(runner_class, lambda: rows)
    for name, wanted in (("_warmup_0_", 0), ("_v2_mixed_warmup_prefill_", 0), ("warmup_0_", 2)):
        begins = scheduled((name, PLAIN))
        begins.num_scheduled_tokens = {name: 2}
        runner_class().execute_model(begins)
        rows.fill(step((name, 2, 0, 5)), CPU)
        assert rows.rows(2).tolist() == [wanted] * 2


def test_levels_follow_the_requests_parameters_and_each_steps_choice() -> None:
    levels = {"own": (1, 1), "kept": (0, 0)}

    def levels_of(parameters: Any, choice: tuple[int, ...]) -> tuple[int, int]:
        prompt, reply = levels[parameters.tier]
        return prompt, max(reply, choice[1]) if parameters.tier == "own" else reply

    rows = RuleRows(PLAN, 16, levels=levels_of)
    asked = [SimpleNamespace(prompt_logprobs=None, tier=tier) for tier in levels]
    first = scheduled(("a", asked[0]), ("b", asked[1]))
    both = step(("a", 4, 0, 3), ("b", 4, 0, 3))
    first.num_scheduled_tokens = {"a": 4, "b": 4}
    with pytest.raises(LeanMoeError, match="does not say at which level it runs"):
        rows.hear(first)
    for choice, replies in (((0, 0), 1), ((0, 3), 5), ((0, 0), 1)):
        first.leanmoe = choice
        rows.hear(first)
        rows.fill(both, CPU)
        assert rows.rows(8).tolist() == [2, 2, replies, replies, 0, 0, 0, 0]
        first = scheduled()
    rows.hear(scheduled())  # a step without rows changes nothing
    rows.fill(both, CPU)
    assert rows.rows(3).tolist() == [2, 2, 1]
