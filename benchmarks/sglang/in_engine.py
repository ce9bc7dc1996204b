"""In SGLang's scheduler process: plans that are exchanged in one engine, and drawn routing.

A plugin beside leanmoe's own. One engine is loaded once; its decode steps are captured for each
variant, so that all of them are measured in every round. Dummy weights give all tokens the same
experts: each layer gets logits of its own in place of its router's, the same for every variant.
The engine is asked through SGLang's `collective_rpc`, which calls methods of its scheduler; answers
are files.

Letters: T rows of a step, E experts, K slots a token.
"""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.vllm.replay import Replay, reference_use
from leanmoe.core.files import write_json
from leanmoe.kernels.dispatch import route_ids
from leanmoe.plan import Plan, Rule
from leanmoe.serve.sglang import patch
from leanmoe.serve.sglang.padding import make_count
from leanmoe.serve.sglang.planned_model import SglangPlan
from leanmoe.serve.sglang.routing import read_router

VARIANTS = "LEANMOE_BENCH_VARIANTS"
"""The variable that names a folder with a plan of each variant; without it nothing is done."""
ROWS = 8192
"""Rows of the drawn logits; larger steps have their own."""
STOCK = "stock"


class SwitchedPlan:
    """Stands in the place of one plan: what is checked is checked for all of them, what is asked is
    asked of the one in use."""

    def __init__(self, plans: dict[str, SglangPlan]) -> None:
        self.plans, self.name = plans, STOCK
        self.is_loading_draft = False

    @property
    def captured_sizes(self) -> tuple[int, ...] | None:
        """Of the steps that are captured, while one of them is."""
        return self.plans[self.name].captured_sizes

    @captured_sizes.setter
    def captured_sizes(self, sizes: tuple[int, ...] | None) -> None:
        for plan in self.plans.values():
            plan.captured_sizes = sizes

    def __getattr__(self, name: str) -> Any:
        return getattr(self.plans[self.name], name)

    def check_model(self, config: Any) -> None:
        """Of all plans."""
        for plan in self.plans.values():
            plan.check_model(config)

    def check_topk(self, topk: Any) -> None:
        """Of all plans."""
        for plan in self.plans.values():
            plan.check_topk(topk)

    def check_layers(self, model: Any, device: Any) -> None:
        """Of all plans."""
        for plan in self.plans.values():
            plan.check_layers(model, device)


class Bench:
    """What runs in the scheduler's process: the variants, the drawn logits, what they chose."""

    def __init__(self, plans: dict[str, Plan], stock_count: Callable[[], bool]) -> None:
        """`plans` by name; that of `STOCK` is empty."""
        self.switched = SwitchedPlan(
            {name: SglangPlan(plan, name, stock_count) for name, plan in plans.items()}
        )
        self.replay = Replay(plans[STOCK].model.experts, ROWS, reference_use())
        self.kept: dict[tuple[str, int], dict[int, tuple[Tensor, Tensor]]] = {}
        self.configs: dict[int, Any] = {}
        self.steps: list[tuple[int, float]] = []
        """Requests and the time of each decode step's start."""
        self.counts: list[tuple[int, int]] | None = None
        """Requests of each decode step and SGLang's count of real rows; None: not looked at."""
        self._graphs: dict[str, tuple[dict[Any, Any], dict[Any, Any]]] = {}

    def routed(self, select: Callable[..., Any]) -> Callable[..., Any]:
        """`select_experts` of drawn logits, under the variant in use."""

        @functools.wraps(select)
        def select_experts(
            hidden_states: Tensor, router_logits: Tensor, topk_config: Any, **others: Any
        ) -> Any:
            rows, layer = router_logits.shape[0], others["layer_id"]
            if rows <= ROWS:
                router_logits = self.replay.logits(layer, router_logits)
            self.configs[layer] = topk_config
            output = select(hidden_states, router_logits, topk_config, **others)
            if self.switched.captured_sizes is not None:  # a replay writes there each time
                kept = self.kept.setdefault((self.switched.name, rows), {})
                kept[layer] = (output.topk_ids, output.topk_weights)
            return output

        return select_experts

    def capture_all(self, runner: Any) -> None:
        """The decode steps of every variant: the graphs are all that differs between them."""
        if runner is None or not hasattr(runner, "backend"):
            return
        backend = runner.backend
        self._graphs[STOCK] = (backend._graphs, backend._outputs)
        for name in self.switched.plans:
            if name != STOCK:
                self.switched.name = name
                backend._graphs, backend._outputs = {}, {}
                runner.capture()
                self._graphs[name] = (backend._graphs, backend._outputs)
        self.select(runner, STOCK)

    def select(self, runner: Any, variant: str) -> None:
        """Lets the next steps run under a variant."""
        self.switched.name = variant
        if variant in self._graphs:
            runner.backend._graphs, runner.backend._outputs = self._graphs[variant]

    def draw(self, runner: Any, routing: str, seed: int) -> None:
        """Draws all layers' logits anew, in place."""
        del runner
        self.replay.draw(routing, seed)

    def step_ms(self, runner: Any, rows: int, replays: int) -> float:
        """Milliseconds of the captured step of so many rows, alone."""
        graphs = runner.backend._graphs
        graph = next(found for key, found in graphs.items() if key.size == rows)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        graph.replay()
        torch.cuda.synchronize()
        begin.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end)) / replays

    def chosen(self, runner: Any, rows: int) -> dict[str, float]:
        """Distinct experts a layer and experts a token, in the last captured step of such size."""
        del runner
        distinct, used = [], []
        for ids_TK, weights_TK in self.kept[self.switched.name, rows].values():
            is_used_TK = (weights_TK != 0) & (ids_TK >= 0)
            distinct.append(len(torch.unique(ids_TK[is_used_TK])))
            used.append(float(is_used_TK.sum()) / rows)
        return {"distinct": sum(distinct) / len(distinct), "activated": sum(used) / len(used)}

    def padding(self, runner: Any, rows: int, real: int) -> dict[str, Any]:
        """What a captured step of `rows` rows does where `real` of them are tokens.

        Its real rows must be routed as they are by themselves, and padding must activate nothing.
        """
        count_1 = runner.buffers.num_token_non_padded
        if count_1 is None:
            return {"counts": False}
        count_1.fill_(real)
        graphs = runner.backend._graphs
        next(found for key, found in graphs.items() if key.size == rows).replay()
        torch.cuda.synchronize()
        wrong, padded = 0, 0
        for layer, (ids_TK, weights_TK) in self.kept[self.switched.name, rows].items():
            active_TK = (weights_TK != 0) & (ids_TK >= 0)
            padded += int(active_TK[real:].sum())
            rule = self._rule(layer, real)
            config = self.configs[layer]
            logits_TE = self.replay.logits(layer, torch.empty(rows, self.replay.experts))[:real]
            top_k = self.switched.plan.model.top_k
            wanted_TK, _ = route_ids(logits_TE, read_router(config), top_k, rule, skipped_id=-1)
            for row in range(real):
                ours = set(ids_TK[row][active_TK[row]].tolist())
                wrong += ours != set(wanted_TK[row].tolist()) - {-1}
        return {"counts": True, "padding_slots": padded, "rows_routed_otherwise": wrong}

    def _rule(self, layer: int, real: int) -> Rule:
        planned = self.switched.plans[self.switched.name]
        number = planned.shape.moe_layers.index(layer) if planned.shape else layer
        return planned.plan.rules_for(real)[number]

    def answered(self, method: Callable[..., Any]) -> Callable[..., None]:
        """A method of SGLang's scheduler that writes what `method` returns to a file."""

        def call(scheduler: Any, answer: str, **arguments: Any) -> None:
            runner = scheduler.tp_worker.model_runner.decode_cuda_graph_runner
            write_json(Path(answer), {"answer": method(runner, **arguments)})

        return call

    def watched(self, execute: Callable[..., Any]) -> Callable[..., Any]:
        """A decode step whose start is noted."""

        @functools.wraps(execute)
        def noted(runner: Any, forward_batch: Any, *arguments: Any, **keywords: Any) -> Any:
            self.steps.append((forward_batch.batch_size, time.perf_counter()))
            output = execute(runner, forward_batch, *arguments, **keywords)
            if self.counts is not None and runner.buffers.num_token_non_padded is not None:
                count = int(runner.buffers.num_token_non_padded)
                self.counts.append((forward_batch.batch_size, count))
            return output

        return noted

    def taken_steps(self, runner: Any) -> list[tuple[int, float]]:
        """The decode steps since the last time it was asked."""
        del runner
        found, self.steps = self.steps, []
        return found

    def taken_counts(self, runner: Any) -> list[tuple[int, int]]:
        """The counts since the last time it was asked; from then on they are looked at."""
        del runner
        found, self.counts = self.counts or [], []
        return found


def install(bench: Bench, topk: Any, model_runner: Any, graph_runner: Any, scheduler: Any) -> None:
    """Puts the benchmark into SGLang's module `topk` and its three classes."""
    patch.patch(bench.switched, topk, model_runner)  # type: ignore[arg-type]
    patch.watch_captures(bench.switched, [graph_runner])  # type: ignore[arg-type]
    topk.select_experts = bench.routed(topk.select_experts)
    graph_runner.execute = bench.watched(graph_runner.execute)
    init = model_runner.init_cuda_graphs

    @functools.wraps(init)
    def init_cuda_graphs(self: Any, *arguments: Any, **keywords: Any) -> Any:
        returned = init(self, *arguments, **keywords)
        bench.capture_all(self.decode_cuda_graph_runner)
        return returned

    model_runner.init_cuda_graphs = init_cuda_graphs
    methods: dict[str, Callable[..., Any]] = {
        "select": bench.select,
        "draw": bench.draw,
        "step_ms": bench.step_ms,
        "chosen": bench.chosen,
        "padding": bench.padding,
        "steps": bench.taken_steps,
        "counts": bench.taken_counts,
    }
    for name, method in methods.items():
        setattr(scheduler, f"leanmoe_{name}", bench.answered(method))


def activate() -> None:
    """The entry point: does nothing unless a folder of variants is named."""
    folder = os.environ.get(VARIANTS)
    if not folder:
        return
    from sglang.srt.layers.moe import topk
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.model_executor.model_runner import ModelRunner
    from sglang.srt.model_executor.runner.decode_cuda_graph_runner import DecodeCudaGraphRunner

    names = json.loads((Path(folder) / "names.json").read_text(encoding="utf-8"))
    plans = {name: Plan.load(Path(folder) / file) for name, file in names.items()}
    install(Bench(plans, make_count()), topk, ModelRunner, DecodeCudaGraphRunner, Scheduler)
