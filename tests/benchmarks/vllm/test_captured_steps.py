"""Graphs of vLLM's two model runners, with stand-ins for both."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.vllm.captured_steps import CapturedSteps

SIZES = (1, 8)


class FirstRunner:
    """V1: the model is wrapped, and the wrapper keeps an entry for each step."""

    def __init__(self) -> None:
        self.model = SimpleNamespace(concrete_cudagraph_entries={"old": None})
        self.eager: list[Any] = []

    def capture_model(self) -> None:
        entries = self.model.concrete_cudagraph_entries
        assert not entries
        for size in SIZES:
            entry = SimpleNamespace(cudagraph=f"graph of {size}")
            entries[SimpleKey(size)] = entry

    def _dummy_run(self, rows: int) -> None:
        self.eager.append(rows)


class SecondRunner:
    """V2: a manager keeps the graphs themselves."""

    def __init__(self) -> None:
        self.model = object()
        self.cudagraph_manager = SimpleNamespace(graphs={"old": None})
        self.eager: list[Any] = []

    def capture_model(self) -> None:
        assert not self.cudagraph_manager.graphs
        for size in SIZES:
            self.cudagraph_manager.graphs[SimpleKey(size)] = f"graph of {size}"

    def _dummy_run(self, rows: int, *, skip_attn: bool, is_profile: bool) -> None:
        assert skip_attn
        assert is_profile, "else a captured step might be replayed"
        self.eager.append(rows)


class SimpleKey:
    """What a step is known by."""

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens


@pytest.mark.parametrize("kind", [FirstRunner, SecondRunner])
def test_sets_of_graphs_are_exchanged(kind: type[Any]) -> None:
    runner = kind()
    steps = CapturedSteps(runner)
    assert steps.can_be_exchanged
    assert steps.is_second_runner == (kind is SecondRunner)
    first, second = steps.capture(), steps.capture()
    assert first is not second
    assert steps.graph(first, 8) == "graph of 8"
    steps.put(first)
    owner = runner.cudagraph_manager if kind is SecondRunner else runner.model
    assert first in vars(owner).values()
    steps.run_eagerly()
    assert runner.eager == [1]


def test_what_was_captured_at_load_lives_on_and_the_pool_of_all_captures_with_it() -> None:
    runner = SecondRunner()
    runner.cudagraph_manager.graphs = {"old": FirstRunner()}
    graph = weakref.ref(runner.cudagraph_manager.graphs["old"])
    steps = CapturedSteps(runner)
    steps.capture()
    gc.collect()
    assert graph() is not None


def test_a_model_that_is_not_captured_has_none() -> None:
    assert not CapturedSteps(SimpleNamespace(model=object())).can_be_exchanged
