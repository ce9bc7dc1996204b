"""Masks are compared with a step's rows; the runners are stand-ins with vLLM's signatures."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from leanmoe.core.errors import LeanMoeError
from leanmoe.plan import Fingerprint, Plan, Rule
from leanmoe.serve.vllm.layer_routing import VllmLayerRouting
from leanmoe.serve.vllm.padding import (
    EAGER_CHECKS,
    PaddingSource,
    PaddingWatch,
    StepPadding,
    padded_rows,
    padding_source,
    rank_share,
    unproven_reason,
    watch_runner,
)
from tests.serve.stand_ins import Context, FusedTopKRouter, install_context, install_runner


@pytest.fixture(autouse=True)
def _vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    install_context(monkeypatch, None)


def after(rows: int, size: int) -> Tensor:
    """The right mask: what is behind the step's rows is padding."""
    return torch.arange(size) >= rows


def captured(watch: PaddingWatch, *masks: Tensor) -> None:
    """Notes masks as a layer does while its step is captured."""
    for mask in masks:
        watch._captured.setdefault(len(mask), []).append(mask)


def step(watch: PaddingWatch, rows: int, mask: Tensor | None) -> None:
    watch.begin(rows)
    watch.note(mask)
    watch.end(rows)


def test_a_mask_of_other_rows_than_the_steps_is_refused() -> None:
    for mask in (after(3, 3), after(3, 4), after(3, 8)):
        step(PaddingWatch(), 3, mask)
    for wrong in (torch.ones(4, dtype=torch.bool), after(4, 4), after(2, 4), None):
        with pytest.raises(LeanMoeError, match=r"in a step of 3 tokens: .* set VLLM_USE_V2"):
            step(PaddingWatch(), 3, wrong)


def test_only_the_first_steps_are_compared() -> None:
    watch = PaddingWatch()
    for _ in range(EAGER_CHECKS):
        step(watch, 3, after(3, 3))
    step(watch, 3, after(0, 3))


def test_a_graph_must_write_the_mask_that_it_reads() -> None:
    """A mask that happens to be right, but that no replay writes, is found out."""
    watch, stale = PaddingWatch(), after(3, 4)
    captured(watch, stale)
    watch.begin(3)
    with pytest.raises(LeanMoeError, match="of 4 rows"):
        watch.end(3)
    watch, decode, mixed = PaddingWatch(), after(0, 4), after(0, 4)
    captured(watch, decode, mixed)
    watch.begin(3)
    mixed.copy_(after(3, 4))  # one of the two graphs of this size ran
    watch.end(3)
    watch.begin(2)
    watch.end(2)  # its size is proven
    watch.forget()
    watch.begin(3)
    watch.end(3)


@dataclass
class Runner:
    """A runner of vLLM's: its layers read `mask` in a step, its graphs one for each size."""

    watch: PaddingWatch | None
    is_right: bool = True
    sizes: tuple[int, ...] = (1, 2, 4, 8)
    steps: list[tuple[int, ...]] = field(default_factory=list)

    def __post_init__(self) -> None:
        group = SimpleNamespace(kv_cache_spec=SimpleNamespace(block_size=2))
        self.kv_cache_config = SimpleNamespace(kv_cache_groups=[group])
        self.vllm_config = settings(self.sizes)

    def execute_model(
        self, scheduler_output: Any, intermediate_tensors: Any = None, dummy_run: bool = False
    ) -> None:
        del intermediate_tensors, dummy_run
        rows = scheduler_output.total_num_scheduled_tokens
        self.steps.append(tuple(scheduler_output.num_scheduled_tokens.values()))
        if self.watch is not None and self.is_right:
            for masks in self.watch._captured.values():
                for mask in masks:
                    mask.copy_(torch.arange(len(mask)) >= rows)

    def capture_model(self, profile_only: bool = False) -> int:
        del profile_only
        if self.watch is not None:
            captured(self.watch, *(after(0, size) for size in self.sizes))
        return 0

    def sample_tokens(self, grammar_output: Any) -> None:
        assert grammar_output is None


def settings(sizes: tuple[int, ...], **others: Any) -> Any:
    return SimpleNamespace(
        parallel_config=SimpleNamespace(pipeline_parallel_size=1, use_ubatching=False),
        speculative_config=None, kv_transfer_config=None,
        model_config=SimpleNamespace(is_encoder_decoder=False, runner_type="generate"),
        compilation_config=SimpleNamespace(cudagraph_capture_sizes=list(sizes)),
        scheduler_config=SimpleNamespace(max_num_seqs=16),
        **others,
    )  # fmt: skip


@dataclass
class NewRequestData:
    """vLLM's, of 0.24: without the fields that came later."""

    req_id: str
    prompt_token_ids: list[int]
    mm_features: list[Any]
    sampling_params: Any
    pooling_params: Any
    block_ids: tuple[list[int], ...]
    num_computed_tokens: int
    lora_request: Any


@dataclass
class SchedulerOutput:
    """vLLM's, as far as a step by hand needs it."""

    scheduled_new_reqs: list[NewRequestData] = field(default_factory=list)
    num_scheduled_tokens: dict[str, int] = field(default_factory=dict)
    total_num_scheduled_tokens: int = 0
    finished_req_ids: set[str] = field(default_factory=set)

    @classmethod
    def make_empty(cls) -> SchedulerOutput:
        return cls()


@pytest.fixture
def runner_class(monkeypatch: pytest.MonkeyPatch) -> Any:
    vllm, output = ModuleType("vllm"), ModuleType("vllm.v1.core.sched.output")
    vllm.__version__ = "0.32.0"  # type: ignore[attr-defined]
    vllm.SamplingParams = lambda **values: values  # type: ignore[attr-defined]
    vars(output).update(NewRequestData=NewRequestData, SchedulerOutput=SchedulerOutput)
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setitem(sys.modules, "vllm.v1.core.sched.output", output)
    return type("GPUModelRunner", (Runner,), {})


def test_captured_steps_are_proven_before_a_request_is_served(runner_class: Any) -> None:
    watch = PaddingWatch()
    watch_runner(runner_class, lambda: watch)
    right = runner_class(watch)
    right.capture_model()
    assert right.steps == [(1, 1, 1), (), (3,), ()], "3 rows in a step of 4"
    wrong = runner_class(watch, is_right=False)
    wrong.capture_model(profile_only=True)
    assert not wrong.steps
    with pytest.raises(LeanMoeError, match="of 4 rows"):
        wrong.capture_model()


def test_a_vllm_that_cannot_run_the_proof_is_refused_in_one_line(
    runner_class: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch_runner(runner_class, PaddingWatch)
    monkeypatch.setattr(runner_class, "sample_tokens", lambda _self: None)
    with pytest.raises(LeanMoeError, match=r"^vLLM 0\.32\.0 cannot run .* \(TypeError: .*unset"):
        runner_class(None).capture_model()


def test_dummy_steps_and_models_without_a_plan_are_not_watched(runner_class: Any) -> None:
    watched: list[PaddingWatch] = []
    watch_runner(runner_class, lambda: watched[0] if watched else None)
    stock = runner_class(None)
    stock.capture_model()
    stock.execute_model(SchedulerOutput(total_num_scheduled_tokens=3))
    watched.append(PaddingWatch())
    runner = runner_class(watched[0], is_right=False)
    captured(watched[0], after(0, 4))
    runner.execute_model(SchedulerOutput(total_num_scheduled_tokens=3), None, True)
    runner.execute_model(SchedulerOutput(total_num_scheduled_tokens=3), dummy_run=True)
    runner.execute_model(SchedulerOutput())
    with pytest.raises(LeanMoeError):
        runner.execute_model(SchedulerOutput(total_num_scheduled_tokens=3))


def test_steps_are_made_by_hand_where_they_can_be() -> None:
    assert unproven_reason(settings((1, 2, 4))) is None
    drafting = settings((1, 2, 4))
    drafting.speculative_config = object()
    assert unproven_reason(drafting) == "a draft speculates"
    assert padded_rows(settings((1, 2, 4, 8))) == 3
    assert padded_rows(settings((8,))) == 7
    assert padded_rows(settings((1, 2, 3))) is None
    assert padded_rows(settings((32,))) is None, "vLLM runs 16 requests at once"


MARKED, SLOTS, NONE = PaddingSource.MARKED, PaddingSource.SLOTS, PaddingSource.NONE
SHARED, ALONE = [Rule(guaranteed=2)], [Rule(threshold=0.5)]


def config(v2: bool = False, context_parallel: int = 1) -> Any:
    parallel = SimpleNamespace(decode_context_parallel_size=context_parallel)
    return SimpleNamespace(use_v2_model_runner=v2, parallel_config=parallel)


@pytest.mark.parametrize(
    ("version", "v2", "has_field", "v1_fills", "v2_fills", "source"),
    [
        ("0.24.0", False, False, False, False, SLOTS),
        ("0.24.0", True, False, False, False, SLOTS),
        ("0.25.0", False, True, False, False, SLOTS),  # the field is there and stays None
        ("0.26.0", False, True, False, True, SLOTS),
        ("0.30.0", False, True, False, True, SLOTS),
        ("0.31.0", False, True, True, True, MARKED),
        ("0.33.0", False, True, True, False, MARKED),
        ("0.26.0", True, True, False, False, SLOTS),  # the field keeps the True of the capture
        ("0.26.0", True, True, False, True, MARKED),
        ("0.33.0", True, True, True, True, MARKED),
    ],
)
def test_the_mask_is_read_where_the_runner_fills_it(
    monkeypatch: pytest.MonkeyPatch, version: str, v2: bool, has_field: bool, v1_fills: bool,
    v2_fills: bool, source: PaddingSource,
) -> None:  # fmt: skip
    install_context(monkeypatch, None)
    install_runner(monkeypatch, has_field, v1_fills, v2_fills)
    assert padding_source(config(v2), SHARED, version) is source


def test_settings_in_which_nothing_says_padding_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install_context(monkeypatch, None)
    install_runner(monkeypatch, v1_fills=False, v2_fills=False)
    with pytest.raises(LeanMoeError, match=r"vLLM 0\.33\.0 .* unset VLLM_MOE_SKIP_PADDING"):
        padding_source(config(v2=True), SHARED, "0.33.0")
    assert padding_source(config(v2=True), ALONE, "0.33.0") is NONE
    split = config(context_parallel=2)
    with pytest.raises(LeanMoeError, match=r"0\.30\.0 .* --decode-context-parallel-size 1"):
        padding_source(split, SHARED, "0.30.0")
    assert padding_source(split, ALONE, "0.30.0") is NONE, "its slots are on other GPUs"


def test_a_mask_that_nobody_fills_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """0.25 and 0.26 on the V2 runner: every row is marked, but three have slots."""
    context = Context({"attention": torch.tensor([5, 6, 7, -1])})
    context.is_padding = torch.ones(4, dtype=torch.bool)  # type: ignore[attr-defined]
    install_context(monkeypatch, context)
    plan = Plan.uniform(Fingerprint("Model", 1, 1, 16, 4), Rule(guaranteed=2))
    routing = VllmLayerRouting(FusedTopKRouter(), plan, 0, padding=StepPadding(SLOTS))
    weights, _ = routing(torch.empty(4, 1), torch.randn(4, 16), None)
    assert weights.sum(-1).tolist() == pytest.approx([1.0, 1.0, 1.0, 0.0])


def test_rows_without_a_place_in_the_cache_are_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    context = Context({"attention": torch.tensor([5, 6, 7, -1, -1])})
    install_context(monkeypatch, context)
    padding = StepPadding()
    mask = padding.rows(5)
    assert mask is not None
    assert mask.tolist() == [False, False, False, True, True]
    assert padding.rows(5) is not None
    assert len(context.additional_kwargs) == 1  # computed once a step


def test_layers_that_keep_a_state_have_no_slots_to_go_by(monkeypatch: pytest.MonkeyPatch) -> None:
    state = type("LinearAttention", (type("MambaBase", (), {}),), {})()
    slots = {"linear": torch.tensor([0, 0, -1]), "attention": torch.tensor([5, 6, 7])}
    context = Context(slots, no_compile_layers={"linear": state, "attention": object()})
    install_context(monkeypatch, context)
    mask = StepPadding().rows(3)
    assert mask is not None
    assert not bool(mask.any())


def test_rows_behind_the_slots_of_a_step_are_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    context = Context({"attention": torch.tensor([5, 6])})
    context.batch_descriptor = SimpleNamespace(num_tokens=4)  # type: ignore[attr-defined]
    install_context(monkeypatch, context)
    mask = StepPadding().rows(4)
    assert mask is not None
    assert mask.tolist() == [False, False, True, True]


def test_what_the_runner_marks_is_read_where_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    context = Context({"attention": torch.tensor([5, 6])})
    context.is_padding = torch.tensor([False, True, True])  # type: ignore[attr-defined]
    install_context(monkeypatch, context)
    mask = StepPadding(MARKED).rows(2)
    assert mask is not None
    assert mask.tolist() == [False, True]
    assert StepPadding(NONE).rows(2) is None


def test_a_step_with_no_cache_has_no_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    install_context(monkeypatch, Context())
    assert StepPadding().rows(3) is None
    install_context(monkeypatch, None)
    assert StepPadding().rows(3) is None


def test_each_sequence_parallel_rank_has_its_share_of_padding() -> None:
    mask = torch.tensor([False, False, False, True, True])
    assert rank_share(mask, 0, 2).tolist() == [False, False, False]
    assert rank_share(mask, 1, 2).tolist() == [True, True, True]


def test_gathered_tokens_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    install_context(monkeypatch, Context({"attention": torch.tensor([5, 6])}))
    with pytest.raises(LeanMoeError, match="--data-parallel-size"):
        StepPadding().rows(4)
