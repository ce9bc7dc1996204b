"""A plan around SGLang's `select_experts`: the rules that a captured step can run, layer by layer.

SGLang asks its `TopK` modules for experts, and those the function `select_experts` of their file. A
rule becomes the custom routing function of the call's config, so that what SGLang does around
routing (scaling, placement of experts, padding, which it fills with -1) stays its own.
"""

from __future__ import annotations

import functools
import inspect
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from leanmoe.core.errors import LeanMoeError
from leanmoe.core.installed_sglang import TESTED
from leanmoe.plan import Plan
from leanmoe.serve.sglang.metrics import show_plan
from leanmoe.serve.sglang.padding import make_count, needs_count
from leanmoe.serve.sglang.planned_model import SglangPlan
from leanmoe.serve.sglang.routing import banded_config, planned_config

logger = logging.getLogger("sglang.leanmoe")
ARGUMENTS = ("hidden_states", "router_logits", "topk_config", "layer_id", "num_token_non_padded")
SETTINGS = (
    "top_k",
    "use_grouped_topk",
    "topk_group",
    "num_expert_group",
    "renormalize",
    "custom_routing_function",
    "correction_bias",
    "scoring_func",
    "output_format",
)
"""What a plan reads or sets of a call (`ARGUMENTS`) and of its config."""
BYPASS = "precomputed_topk_postprocess_is_noop"
"""SGLang's function that says whether a kernel of a model's own may stand for `select_experts`."""
COUNT = "num_token_non_padded"
CAPTURE = "capture_one_shape"
"""A graph runner's method that captures the steps of one size."""


def start(plan: Plan, path: str) -> None:
    """Puts a plan to work in this process; raises LeanMoeError if that cannot be."""
    try:
        from sglang.srt.layers.moe import topk
        from sglang.srt.model_executor.model_runner import ModelRunner
        from sglang.srt.model_executor.runner.decode_cuda_graph_runner import DecodeCudaGraphRunner
        from sglang.srt.model_executor.runner.prefill_cuda_graph_runner import (
            PrefillCudaGraphRunner,
        )
    except ImportError as error:
        raise LeanMoeError(
            f"this SGLang has no {error.name or error}, where a plan is put: install {TESTED}"
        ) from error
    stock_count = make_count() if needs_count(plan) else None
    planned = SglangPlan(plan, path, stock_count)
    patch(planned, topk, ModelRunner)
    watch_captures(planned, (DecodeCudaGraphRunner, PrefillCudaGraphRunner))
    logger.info("leanmoe: plan %s read in process %d", path, os.getpid())


def patch(planned: SglangPlan, topk: Any, runner: Any) -> None:
    """Wraps SGLang's functions in its module `topk` and its class `runner`.

    Raises LeanMoeError for functions of another shape than in the version tested.
    """
    _check_functions(topk)
    topk.select_experts = _planned_select(planned, topk.select_experts)
    if hasattr(topk, BYPASS):  # a model's own kernel asks this before it passes the function by
        setattr(topk, BYPASS, lambda *_arguments, **_keywords: False)
    bind, load = topk.TopK.bind_runner_backend, runner.load_model

    @functools.wraps(bind)
    def bind_runner_backend(self: Any, *arguments: Any, **keywords: Any) -> Any:
        returned = bind(self, *arguments, **keywords)
        planned.check_topk(self)
        return returned

    @functools.wraps(load)
    def load_model(self: Any, *arguments: Any, **keywords: Any) -> Any:
        planned.is_loading_draft = bool(getattr(self, "is_draft_worker", False))
        if planned.is_loading_draft:
            returned = load(self, *arguments, **keywords)
            planned.is_loading_draft = False
            planned.log_draft()
            return returned
        planned.check_model(self.model_config.hf_config)
        returned = load(self, *arguments, **keywords)
        planned.check_layers(self.model, self.device)
        show_plan(planned.path, self.server_args)
        return returned

    topk.TopK.bind_runner_backend = bind_runner_backend
    runner.load_model = load_model


def watch_captures(planned: SglangPlan, runners: Sequence[Any]) -> None:
    """Tells the plan, while one of SGLang's graph runners captures a step, which sizes it captures.

    A step is replayed in the smallest size that it fits. Raises LeanMoeError for a runner that
    captures by another method.
    """
    for runner in runners:
        if not hasattr(runner, CAPTURE):
            raise LeanMoeError(
                f"this SGLang's {runner.__name__} has no {CAPTURE}: install {TESTED}"
            )
        setattr(runner, CAPTURE, _watched(planned, getattr(runner, CAPTURE)))


def _watched(planned: SglangPlan, stock: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(stock)
    def capture_one_shape(self: Any, *arguments: Any, **keywords: Any) -> Any:
        rows = getattr(self, "capture_num_tokens", None)
        if rows is None:
            rows = [size * self.captured_req_width for size in self.capture_bs]
        planned.captured_sizes = tuple(sorted(rows))
        try:
            return stock(self, *arguments, **keywords)
        finally:
            planned.captured_sizes = None

    return capture_one_shape


def _check_functions(topk: Any) -> None:
    """Refuses an SGLang that simulates its routing, or whose functions are of another shape."""
    simulated = getattr(topk, "routing_simulation_enabled", None)
    if simulated is not None and simulated():
        raise LeanMoeError(
            "SGLang is told to simulate its routing, so no plan would run: unset "
            "SGLANG_SIMULATE_UNIFORM_EXPERTS and SGLANG_SIMULATE_ROUND_ROBIN_EXPERTS"
        )
    parameters = inspect.signature(topk.select_experts).parameters
    missing = [name for name in ARGUMENTS if name not in parameters]
    missing += [name for name in SETTINGS if name not in topk.TopKConfig.__dataclass_fields__]
    if missing:
        raise LeanMoeError(
            f"this SGLang's select_experts knows no {missing[0]}: install {TESTED}, which leanmoe "
            "was written for"
        )


def _planned_select(planned: SglangPlan, stock: Callable[..., Any]) -> Callable[..., Any]:
    """SGLang's `select_experts`, each call under the plan's rule for its layer and rows."""

    @functools.wraps(stock)
    def select_experts(
        hidden_states: Tensor, router_logits: Tensor, topk_config: Any, **others: Any
    ) -> Any:
        real_1 = others.get(COUNT)
        if not planned.keeps_count:
            others.pop(COUNT, None)
        rows = router_logits.shape[0]
        bands = planned.bands(topk_config, others.get("layer_id"), rows, real_1 is not None)
        if any(not band.rule.is_empty for band in bands):
            if others.get("dynamic_expert_bias") is not None:
                raise LeanMoeError("a bias for each token cannot run under a plan")
            # A table of places would read id -1 as its last expert.
            has_places = others.get("expert_location_dispatch_info") is not None
            skipped_id = None if has_places else planned.skipped_id
            step = (planned.plan.model.top_k, real_1, skipped_id)
            if len(bands) == 1:
                topk_config = planned_config(topk_config, bands[0].rule, *step)
            else:
                topk_config = banded_config(topk_config, bands, *step)
        return stock(hidden_states, router_logits, topk_config, **others)

    return select_experts
