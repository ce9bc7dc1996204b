"""A plan around SGLang's `select_experts`: the rules that a captured step can run, layer by layer.

Letters: T tokens (rows of a step), E experts, K slots of a token.

SGLang asks its `TopK` modules for experts, and those the function `select_experts` of their file. A
rule becomes the custom routing function of the call's config, so that what SGLang does around
routing (scaling, placement of experts, padding, which it fills with -1) stays its own.
"""

from __future__ import annotations

import functools
import inspect
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from leanmoe.core.errors import LeanMoeError
from leanmoe.kernels.dispatch import route_ids
from leanmoe.models.routers import Router
from leanmoe.models.shape import MoEShape, read_shape
from leanmoe.plan import Plan, Rule
from leanmoe.serve.plugin_options import is_plain

logger = logging.getLogger("sglang.leanmoe")
TESTED = "0.5.23"
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
SIGMOID_EPSILON = 1e-20
BYPASS = "precomputed_topk_postprocess_is_noop"
"""SGLang's function that says whether a kernel of a model's own may stand for `select_experts`."""


class SglangPlan:
    """The plan of this process and the layers that SGLang built."""

    def __init__(self, plan: Plan, path: str) -> None:
        self.plan, self.path = plan, path
        self.shape: MoEShape | None = None
        self.seen: set[int] = set()

    def check_model(self, config: Any) -> None:
        """Refuses a model that the plan was not made for."""
        self.shape = read_shape(config.to_dict())
        self.plan.check(self.shape.fingerprint())
        router = self.shape.router
        if router.zero_experts or router.expert_scale:
            raise LeanMoeError(
                f"{self.shape.model_type}: SGLang's hook knows no identity experts and no factor "
                "on each expert's weight: unset LEANMOE_PLAN"
            )

    def check_layers(self) -> None:
        """Refuses a model of which not every MoE layer asks a `TopK` for its experts."""
        planned = set() if self.shape is None else set(self.shape.moe_layers)
        if not planned or self.seen & planned != planned:
            raise LeanMoeError(
                f"the plan has rules for MoE layers {sorted(planned)}, SGLang built "
                f"{sorted(self.seen & planned)}: this model chooses experts elsewhere; unset "
                "LEANMOE_PLAN to run it in full"
            )
        logger.info(
            "leanmoe: plan %s at work in %d MoE layers of process %d",
            self.path, len(planned), os.getpid(),
        )  # fmt: skip

    def check_topk(self, topk: Any) -> None:
        """Refuses a layer whose kernel chooses experts, or in which shared experts are fused."""
        layer = self._layer(topk.layer_id)
        if layer is None or topk.is_draft:
            return
        self.seen.add(topk.layer_id)
        form = getattr(topk.topk_config.output_format, "name", "STANDARD")
        if form != "STANDARD":
            raise LeanMoeError(
                f"layer {topk.layer_id}: SGLang's kernel chooses experts itself ({form}): set "
                "--moe-runner-backend triton, or unset LEANMOE_PLAN"
            )
        if getattr(topk.topk_config, "num_shared_topk_slots", 0):
            raise LeanMoeError(
                f"layer {topk.layer_id}: shared experts are fused into the routed ones: set "
                "--disable-shared-experts-fusion"
            )

    def rule(self, layer_id: int | None, rows: int) -> Rule:
        """The rule of a layer for a step of so many rows; empty for layers not in the plan."""
        layer = self._layer(layer_id)
        band = self.plan.band_for(max(1, rows))
        return Rule() if band is None or layer is None else band.rules[layer]

    def _layer(self, layer_id: int | None) -> int | None:
        if self.shape is None or layer_id not in self.shape.moe_layers:
            return None
        return self.shape.moe_layers.index(layer_id)


def planned_config(config: Any, rule: Rule, top_k: int, padded_at: Tensor | None) -> Any:
    """SGLang's config of a call with the rule in it.

    `padded_at` is the number of rows that are tokens, on the device; None for all of them.
    """
    if is_plain(rule):
        return replace(config, top_k=rule.top_k or config.top_k)
    router = read_router(config)

    def custom(
        hidden_states: Tensor, gating_output: Tensor, topk: int, renormalize: bool
    ) -> tuple[Tensor, Tensor]:
        del hidden_states, topk, renormalize
        padding_T = None
        if padded_at is not None:
            rows_T = torch.arange(gating_output.shape[0], device=gating_output.device)
            padding_T = rows_T >= padded_at
        bias_E = config.correction_bias
        ids, weights = route_ids(gating_output, router, top_k, rule, bias_E, padding_T)
        return weights, ids

    slots = top_k if rule.top_k is None else rule.top_k
    return replace(config, top_k=slots, use_grouped_topk=False, custom_routing_function=custom)


def read_router(config: Any) -> Router:
    """How SGLang's own routing chooses.

    Scaling is left out: SGLang scales after a custom function, too. Raises LeanMoeError for a
    router that leanmoe cannot compute.
    """
    if config.custom_routing_function is not None:
        raise LeanMoeError("its routing is a function of its own: only top_k alone can run here")
    if config.scoring_func not in ("softmax", "sigmoid"):
        raise LeanMoeError(f"it scores by {config.scoring_func}: only top_k alone can run here")
    has_bias = config.correction_bias is not None
    # Grouped routing with a bias is DeepSeek-V3's, whatever scoring_func says.
    is_sigmoid = config.scoring_func == "sigmoid" or (config.use_grouped_topk and has_bias)
    normalise = bool(config.renormalize)
    return Router(
        scoring="sigmoid" if is_sigmoid else "softmax",
        ranking_bias="correction_bias" if has_bias else None,
        normalise=normalise,
        normalise_epsilon=SIGMOID_EPSILON if is_sigmoid and normalise else 0.0,
        groups=(config.num_expert_group or 1) if config.use_grouped_topk else 1,
        groups_used=(config.topk_group or 1) if config.use_grouped_topk else 1,
        group_score="top2_sum" if has_bias else "max",
    )


def start(plan: Plan, path: str) -> None:
    """Puts a plan to work in this process; raises LeanMoeError if that cannot be."""
    try:
        from sglang.srt.layers.moe import topk
        from sglang.srt.model_executor.model_runner import ModelRunner
    except ImportError as error:
        raise LeanMoeError(
            f"this SGLang has no {error.name}, where a plan is put: install {TESTED}"
        ) from error
    patch(SglangPlan(plan, path), topk, ModelRunner)
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
        if getattr(self, "is_draft_worker", False):
            return load(self, *arguments, **keywords)
        planned.check_model(self.model_config.hf_config)
        returned = load(self, *arguments, **keywords)
        planned.check_layers()
        return returned

    topk.TopK.bind_runner_backend = bind_runner_backend
    runner.load_model = load_model


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
        rule = planned.rule(others.get("layer_id"), router_logits.shape[0])
        if not rule.is_empty:
            if others.get("dynamic_expert_bias") is not None:
                raise LeanMoeError("a bias for each token cannot run under a plan")
            padded_at = others.get("num_token_non_padded")
            topk_config = planned_config(topk_config, rule, planned.plan.model.top_k, padded_at)
        return stock(hidden_states, router_logits, topk_config, **others)

    return select_experts
