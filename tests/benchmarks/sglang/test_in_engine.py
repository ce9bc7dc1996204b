"""The benchmark in the scheduler's process, on stand-ins of SGLang's module and classes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from benchmarks.sglang.in_engine import Bench, install
from leanmoe.plan import Plan, Rule
from leanmoe.serve.sglang import planned_model
from tests.serve.sglang.test_patch import CONFIG, MODEL, Model, TopK, TopKConfig, select_experts

PLANS = {"stock": Plan(MODEL), "few": Plan.uniform(MODEL, Rule(top_k=2))}
PLANS["shared"] = Plan.uniform(MODEL, Rule(guaranteed=1))


class Output(NamedTuple):
    topk_weights: Tensor
    topk_ids: Tensor


class Key(NamedTuple):
    size: int


class GraphRunner:
    """Captures a step of 8 rows as a function that routes both layers anew into the same place."""

    capture_num_tokens = (8,)

    def __init__(self, module: Any) -> None:
        self.module = module
        self.buffers = SimpleNamespace(num_token_non_padded=torch.tensor([8], dtype=torch.int32))
        self.backend = SimpleNamespace(_graphs={}, _outputs={})
        self.capture()

    def capture(self) -> None:
        self.capture_one_shape()

    def capture_one_shape(self) -> None:
        select, count = self.module.select_experts, self.buffers.num_token_non_padded
        call = {"num_token_non_padded": count}

        def run() -> list[Output]:
            return [
                select(torch.empty(8, 1), torch.zeros(8, 16), TopKConfig(), layer_id=layer, **call)
                for layer in (0, 1)
            ]

        outputs = run()
        self.backend._graphs[Key(8)] = SimpleNamespace(replay=lambda: self.again(run, outputs))

    def again(self, run: Callable[[], list[Output]], outputs: list[Output]) -> None:
        """What a replay is: the captured step under its own variant, into its own places."""
        for old, new in zip(outputs, run(), strict=True):
            old.topk_ids.copy_(new.topk_ids)
            old.topk_weights.copy_(new.topk_weights)

    def execute(self, forward_batch: Any) -> str:
        return f"step of {forward_batch.batch_size}"


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A loaded engine with the benchmark in it, and its steps captured."""
    for name in ("check_counts", "not_counted_reason", "not_minus_one_reason"):
        monkeypatch.setattr(planned_model, name, lambda *_: None)
    monkeypatch.setattr(planned_model, "fails_on_minus_one", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def select(*arguments: Any, **named: Any) -> Output:
        return Output(*select_experts(*arguments, **named))

    # as SGLang's own: the names of its arguments are read
    select.__wrapped__ = select_experts  # type: ignore[attr-defined]
    module = SimpleNamespace(select_experts=select, TopKConfig=TopKConfig)
    module.TopK = type("TopK", (TopK,), {"bind_runner_backend": TopK.bind_runner_backend})
    graphs = type("Graphs", (GraphRunner,), {})

    class ModelRunner:
        model_config = SimpleNamespace(hf_config=SimpleNamespace(to_dict=lambda: CONFIG))
        device, server_args, model = "cpu", SimpleNamespace(), Model()

        def load_model(self) -> None:
            for layer in (0, 1):
                module.TopK(layer).bind_runner_backend(None)

        def init_cuda_graphs(self) -> None:
            self.decode_cuda_graph_runner = graphs(module)

    class Scheduler:
        def __init__(self, runner: Any) -> None:
            self.tp_worker = SimpleNamespace(model_runner=runner)

    bench = Bench(PLANS, lambda: False)
    install(bench, module, ModelRunner, graphs, Scheduler)
    runner = ModelRunner()
    runner.load_model()
    runner.init_cuda_graphs()
    return SimpleNamespace(bench=bench, scheduler=Scheduler(runner), runner=runner, module=module)


def ask(engine: SimpleNamespace, folder: Path, method: str, **arguments: Any) -> Any:
    path = folder / "answer.json"
    getattr(engine.scheduler, f"leanmoe_{method}")(answer=str(path), **arguments)
    return json.loads(path.read_text())["answer"]


def test_each_variant_has_its_own_graphs_and_drawn_routing(
    engine: SimpleNamespace, tmp_path: Path
) -> None:
    ask(engine, tmp_path, "draw", routing="uniform", seed=1)
    seen = {}
    for variant in PLANS:
        ask(engine, tmp_path, "select", variant=variant)
        graphs = engine.runner.decode_cuda_graph_runner.backend._graphs
        graphs[Key(8)].replay()
        seen[variant] = ask(engine, tmp_path, "chosen", rows=8)
    assert seen["stock"]["activated"] == 4
    assert seen["few"]["activated"] == 2
    assert seen["shared"]["distinct"] < seen["stock"]["distinct"]


def test_padding_is_looked_at_in_a_captured_step(engine: SimpleNamespace, tmp_path: Path) -> None:
    ask(engine, tmp_path, "draw", routing="uniform", seed=1)
    ask(engine, tmp_path, "select", variant="shared")
    found = ask(engine, tmp_path, "padding", rows=8, real=5)
    assert found == {"counts": True, "padding_slots": 0, "rows_routed_otherwise": 0}


def test_a_step_in_which_padding_votes_is_found_out(
    engine: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask(engine, tmp_path, "draw", routing="uniform", seed=1)
    ask(engine, tmp_path, "select", variant="shared")
    runner = engine.runner.decode_cuda_graph_runner
    told = runner.buffers.num_token_non_padded
    monkeypatch.setattr(
        runner.buffers,
        "num_token_non_padded",
        told.clone(),  # what the graph reads stays 8
    )
    found = ask(engine, tmp_path, "padding", rows=8, real=2)
    assert found["padding_slots"] > 0
    assert found["rows_routed_otherwise"] > 0


def test_steps_and_counts_are_noted(engine: SimpleNamespace, tmp_path: Path) -> None:
    runner = engine.runner.decode_cuda_graph_runner
    assert runner.execute(SimpleNamespace(batch_size=3)) == "step of 3"
    ((requests, _),) = ask(engine, tmp_path, "steps")
    assert requests == 3
    assert ask(engine, tmp_path, "steps") == []
    assert ask(engine, tmp_path, "counts") == []
    runner.execute(SimpleNamespace(batch_size=7))
    assert ask(engine, tmp_path, "counts") == [[7, 8]]
