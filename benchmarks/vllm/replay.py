"""vLLM's layers routed by drawn logits, under one of several variants that can be exchanged.

Dummy weights give all tokens the same experts, so their routing says nothing: each layer is given
logits of its own in place of its router's, the same for every variant, at no cost in a captured
step.

Letters: L MoE layers, T rows of a step, E experts, K slots a token.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.vllm.captured_steps import CapturedSteps
from benchmarks.vllm.layout import SINGLE, Layout, Ranks
from benchmarks.vllm.settings import has_gpu
from benchmarks.vllm.step_results import Seen
from benchmarks.vllm.variants import AUTO, DROP, GROUP, LEANMOE, REPEAT, SKIP, STOCK, Variant
from leanmoe.plan.placement import Placement
from leanmoe.serve.vllm.checks import scope_of
from leanmoe.serve.vllm.layer_routing import VllmLayerRouting
from leanmoe.serve.vllm.skipped_slots import (
    LeanmoeExperts,
    all_sizes_unsupported_reason,
    kernels_unsupported_reason,
)
from leanmoe.serve.vllm.small_steps import (
    LayerSteps,
    grouping_unsupported_reason,
    small_steps_unsupported_reason,
)

ROUTINGS = ("skewed", "uniform")
USE = Path(__file__).parent / "data/reference_use.json"
"""How often the reference model uses each of its experts; the file says where that was measured."""
KEPT_ROWS = 1024
"""Steps of more rows are prefill: their ids are not kept. On a GPU only captured steps' are."""


def reference_use() -> list[list[float]]:
    """Each expert's share of the slots of the reference model's MoE layers (L,E)."""
    use_LE: list[list[float]] = json.loads(USE.read_text(encoding="utf-8"))["use_LE"]
    return use_LE


class Replay:
    """The drawn logits of all layers, the variant that is in use, and what it chose."""

    def __init__(self, experts: int, rows: int, use_LE: Sequence[Sequence[float]]) -> None:
        """`use_LE`: how often each expert of each layer of some model is chosen, any E."""
        self.variant = STOCK
        self.experts, self._rows = experts, rows
        self._use_LE = use_LE
        self._logits: dict[int, Tensor] = {}
        self.data_rank = 0
        self.own: set[str] = set()
        """Variants whose experts leanmoe's kernels compute."""
        self.kept: dict[tuple[str, int], dict[int, tuple[Tensor, Tensor]]] = {}

    def logits(self, layer: int, own_TE: Tensor) -> Tensor:
        """A layer's drawn logits, as many and of the dtype of its own."""
        if layer not in self._logits:
            shape = (self._rows, own_TE.shape[1])
            with torch.inference_mode(False):
                self._logits[layer] = torch.zeros(shape, dtype=own_TE.dtype, device=own_TE.device)
        return self._logits[layer][: own_TE.shape[0]]

    def draw(self, routing: str, seed: int) -> None:
        """Draws anew, in place, so that captured steps see it.

        Each token's experts are drawn without replacement (logits are the logarithm of an expert's
        share of use plus Gumbel noise): "uniform" with equal shares, "skewed" with those of the
        reference model's layers, stretched to as many experts and shuffled. Data-parallel ranks
        have tokens of their own, of the same shares.
        """
        generator = np.random.default_rng(seed)
        others = np.random.default_rng((seed, self.data_rank))
        for layer, buffer in self._logits.items():
            shares_E = np.full(self.experts, 1 / self.experts)
            if routing == "skewed":
                use_E = np.sort(np.asarray(self._use_LE[layer % len(self._use_LE)]))
                places = (np.arange(self.experts) + 0.5) / self.experts * len(use_E) - 0.5
                shares_E = np.interp(places, np.arange(len(use_E)), use_E)
                shares_E = generator.permutation(shares_E / shares_E.sum())
            noise_TE = generator.gumbel(size=tuple(buffer.shape))
            if self.data_rank:
                noise_TE = others.gumbel(size=tuple(buffer.shape))
            drawn_TE = torch.from_numpy(np.log(shares_E) + noise_TE).float()
            buffer.copy_(drawn_TE.to(buffer.dtype))

    def keep(self, layer: int, ids_TK: Tensor, weights_TK: Tensor) -> None:
        """Holds on to what a layer chose; a captured step writes there each time it is replayed."""
        is_eager = ids_TK.is_cuda and not torch.cuda.is_current_stream_capturing()
        if ids_TK.shape[0] <= KEPT_ROWS and not is_eager:
            self.kept.setdefault((self.variant, ids_TK.shape[0]), {})[layer] = (ids_TK, weights_TK)

    def used(self, variant: str, rows: int, tokens: int) -> tuple[Tensor, float]:
        """The active experts (L,E) of the last step of so many rows, and experts a token."""
        layers = self.kept[variant, rows]
        active_LE = torch.zeros(len(layers), self.experts, dtype=torch.int32)
        used = []
        for active_E, (_, (ids_TK, weights_TK)) in zip(
            active_LE, sorted(layers.items()), strict=True
        ):
            is_used_TK = weights_TK[:tokens] != 0
            active_E[ids_TK[:tokens][is_used_TK].long().cpu()] = 1
            used.append(float(is_used_TK.sum()) / tokens)
        return active_LE, float(np.mean(used))


class Switch:
    """Stands in the place of a layer's routing: drawn logits, and the variant that is in use."""

    def __init__(self, runner: Any, layer: int, replay: Replay) -> None:
        self._runner, self._layer, self._replay = runner, layer, replay
        router = runner.router
        self._router = copy.copy(router)  # as it was: `router` gets this in its routing's place
        self._stock = router._compute_routing
        self._variants: dict[str, Callable[..., Any]] = {STOCK: self._stock}

    def add(self, variant: Variant) -> None:
        """One variant more."""
        if variant.plan is None:
            self._variants[variant.name] = self._stock
            return
        scope = scope_of(self._runner, variant.plan.model.experts, variant.cross_rank)
        routing = VllmLayerRouting(self._router, variant.plan, self._layer, scope=scope)
        if not variant.is_plain:
            routing.skipping = variant.skipping
        self._variants[variant.name] = routing

    def groups_step(self, rows: int) -> bool:
        """Whether a step of so many rows is grouped under the variant in use."""
        variant = self._variants[self._replay.variant]
        return isinstance(variant, VllmLayerRouting) and variant.groups_step(rows)

    def skips_step(self, rows: int) -> bool:
        """Whether slots of a step of so many rows may have no row under the variant in use."""
        variant = self._variants[self._replay.variant]
        return isinstance(variant, VllmLayerRouting) and variant.skips_step(rows)

    def __call__(
        self, hidden_states: Tensor, router_logits: Tensor, indices_type: Any, **others: Any
    ) -> tuple[Tensor, Tensor]:
        logits_TE = self._replay.logits(self._layer, router_logits)
        variant = self._variants[self._replay.variant]
        weights, ids = variant(hidden_states, logits_TE, indices_type, **others)
        self._replay.keep(self._layer, ids, weights)
        return weights, ids


class ExpertsSwitch:
    """Stands in the place of a layer's experts: vLLM's or leanmoe's, as the variant has it."""

    def __init__(self, runner: Any, replay: Replay) -> None:
        self._own, self._replay = LeanmoeExperts(runner), replay
        runner.routed_experts.quant_method.moe_kernel.fused_experts.apply = self

    def __call__(self, **arguments: Any) -> None:
        compute = self._own if self._replay.variant in self._replay.own else self._own.stock
        compute(**arguments)


class Engine:
    """A vLLM engine whose captured steps can be exchanged, one set per variant.

    With several GPUs there is one such process for each, and all do the same at the same time.
    """

    def __init__(self, llm: Any, replay: Replay, layout: Layout = SINGLE) -> None:
        self._engine, self.replay, self._layout = llm.llm_engine, replay, layout
        self.ranks = Ranks(layout)
        replay.data_rank = self.ranks.data_rank
        core = self._engine.engine_core.engine_core
        self._runner = core.model_executor.driver_worker.worker.model_runner
        self._steps = CapturedSteps(self._runner)
        self.is_captured = has_gpu() and self._steps.can_be_exchanged
        self._graphs: dict[str, Any] = {}
        self._requests = 0
        forward = self._engine.vllm_config.compilation_config.static_forward_context
        self.moe_layers: list[Any] = [
            layer for layer in forward.values() if hasattr(layer, "routed_experts")
        ]
        self._switches = [
            Switch(layer, number, replay) for number, layer in enumerate(self.moe_layers)
        ]
        for layer, switch in zip(self.moe_layers, self._switches, strict=True):
            layer.router._compute_routing = switch
        slots = [self.moe_layers[0].router.top_k]
        reason = all_sizes_unsupported_reason(self.moe_layers[0], slots, replay.experts)
        self._can_drop = reason is None
        self._why_not_ours = kernels_unsupported_reason(self.moe_layers[0])
        self.layers = len(self.moe_layers)
        self._steps.run_eagerly()  # the buffers of drawn logits
        replay.draw("uniform", 0)

    def settled(self, variant: Variant) -> Variant:
        """A variant with its small steps as this engine can run them, where that is left to it."""
        if variant.small_steps != AUTO or variant.experts == LEANMOE:
            return variant
        variants = [replace(variant, small_steps=how) for how in (DROP, GROUP, SKIP, REPEAT)]
        return next(found for found in variants if self.why_not(found) is None)

    def why_not(self, variant: Variant) -> str | None:
        """Why this engine cannot run a variant; None if it can."""
        if variant.experts == LEANMOE:
            return self._why_not_ours
        if variant.is_plain or variant.plan is None or variant.small_steps == REPEAT:
            return None
        step = (self.moe_layers[0], variant.slots, variant.plan.model.experts)
        if variant.small_steps == DROP:
            return all_sizes_unsupported_reason(*step)
        reason = small_steps_unsupported_reason(*step)
        return reason or (grouping_unsupported_reason() if variant.small_steps == GROUP else None)

    def add(self, variant: Variant) -> None:
        """One variant more, captured."""
        self.put(variant)
        self.capture(variant.name)

    def put(self, variant: Variant) -> None:
        """One variant more, whose decode steps are not captured."""
        if variant.experts == LEANMOE:
            if not self.replay.own:
                for layer in self.moe_layers:
                    ExpertsSwitch(layer, self.replay)
            self.replay.own.add(variant.name)
        if variant.small_steps in (DROP, GROUP) and not variant.is_plain:
            for layer, switch in zip(self.moe_layers, self._switches, strict=True):
                skips_step = switch.skips_step if self._can_drop else None
                LayerSteps(layer, switch.groups_step, skips_step).put()
        for switch in self._switches:
            switch.add(variant)

    def capture(self, variant: str) -> None:
        """Captures the decode steps of all sizes under a variant."""
        self.replay.variant = variant
        if self.is_captured:
            self._graphs[variant] = self._steps.capture()

    def select(self, variant: str) -> None:
        """Lets the next steps run under a variant."""
        self.replay.variant = variant
        if self.is_captured:
            self._steps.put(self._graphs[variant])

    def decode(self, requests: int, prompt: int, steps: int) -> tuple[float, int]:
        """Seconds and tokens of decode steps of so many requests, the engine's work included.

        The requests are those of all data-parallel ranks, which share them evenly.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        requests //= self._layout.data
        generator = np.random.default_rng(requests)
        parameters = SamplingParams(
            max_tokens=steps + 6, ignore_eos=True, detokenize=False, temperature=0.0,
            output_kind=RequestOutputKind.DELTA,
        )  # fmt: skip
        waiting = set()
        for _ in range(requests):
            self._requests += 1
            name = str(self._requests)
            ids = generator.integers(1, 500, prompt).tolist()
            self._engine.add_request(name, {"prompt_token_ids": ids}, parameters)
            waiting.add(name)
        names = set(waiting)
        while waiting:
            waiting -= {self._base(found.request_id, names) for found in self._engine.step()}
        for _ in range(2):
            self._engine.step()
        self.wait()
        self.ranks.slowest(0.0)  # all begin at the same time
        started, tokens = time.perf_counter(), 0
        for _ in range(steps):
            tokens += sum(len(found.outputs[0].token_ids) for found in self._engine.step())
        self.wait()
        took = self.ranks.slowest(time.perf_counter() - started)
        tokens *= self._layout.data
        self.finish()
        return took, tokens

    def is_same(self, variant: str, other: str) -> bool:
        """Whether both variants answer with the same tokens, on every GPU."""
        differ = self.tokens(variant, 8, 24) != self.tokens(other, 8, 24)
        return not bool(self.ranks.most(torch.tensor([int(differ)]))[0])

    def experts(self, variant: str, requests: int) -> Seen:
        """The experts that the last step of so many requests activated, on all GPUs."""
        rows = requests // self._layout.data
        if self.is_captured:  # all graphs share memory: another's replay may have written there
            self._steps.graph(self._graphs[variant], rows).replay()
            self.wait()
        active_LE, activated = self.replay.used(variant, rows, rows)
        active_LE = self.ranks.most(active_LE)
        placement = Placement.linear(active_LE.shape[1], self._layout.expert_ranks)
        by_rank = [active_LE[:, placement.experts_on(r)].sum(-1) for r in range(placement.ranks)]
        count_LR = torch.stack(by_rank, dim=-1).double()
        return Seen(
            float(count_LR.sum(-1).mean()),
            float(count_LR.max(-1).values.mean()),
            tuple(count_LR.mean(0).tolist()),
            activated,
        )

    def tokens(self, variant: str, requests: int, count: int) -> dict[str, list[int]]:
        """Greedy replies to so many prompts of different lengths, by prompt."""
        from vllm import SamplingParams

        self.select(variant)
        parameters = SamplingParams(
            max_tokens=count, ignore_eos=True, detokenize=False, temperature=0.0
        )
        generator, replies = np.random.default_rng(1), {}
        for number in range(requests):
            ids = generator.integers(1, 500, 5 + 3 * number).tolist()
            self._requests += 1
            self._engine.add_request(str(self._requests), {"prompt_token_ids": ids}, parameters)
        while self._engine.has_unfinished_requests():
            for found in self._engine.step():
                if found.finished:
                    prompt = ",".join(map(str, found.prompt_token_ids))
                    replies[prompt] = list(found.outputs[0].token_ids)
        return replies

    def step_seconds(self, rows: int, variant: str, replays: int) -> float:
        """Seconds of one captured step of the model alone, replayed as the last request left it.

        `rows` are those of one data-parallel rank.
        """
        graph = self._steps.graph(self._graphs[variant], rows)
        return self.replayed(graph.replay, replays)

    def replayed(self, replay: Callable[[], None], replays: int) -> float:
        """Seconds of one of so many replays, on the slowest GPU; without one, of one on the CPU."""
        replay()
        self.wait()
        self.ranks.slowest(0.0)
        if not torch.cuda.is_available():
            started = time.perf_counter()
            replay()
            return time.perf_counter() - started
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(replays):
            replay()
        end.record()
        end.synchronize()
        return self.ranks.slowest(float(start.elapsed_time(end)) / 1e3 / replays)

    def add_prompt(self, tokens: int) -> None:
        """One request with so many tokens, of which one token is wanted."""
        from vllm import SamplingParams

        self._requests += 1
        ids = np.random.default_rng(tokens).integers(1, 500, tokens).tolist()
        parameters = SamplingParams(
            max_tokens=1, ignore_eos=True, detokenize=False, temperature=0.0
        )
        self._engine.add_request(str(self._requests), {"prompt_token_ids": ids}, parameters)

    def finish(self) -> None:
        """Runs steps until no request is left."""
        while self._engine.has_unfinished_requests():
            self._engine.step()

    @staticmethod
    def _base(name: str, names: set[str]) -> str:
        """The name a request was given; vLLM may add to it."""
        return name if name in names else name.split("-")[0]

    def wait(self) -> None:
        """Until the GPU has done what it was given."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
