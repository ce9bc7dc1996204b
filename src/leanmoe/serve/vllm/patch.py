"""Finds vLLM's MoE layers as they are built and puts a plan in the place of their routing."""

from __future__ import annotations

import functools
import logging
import os
import re
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from leanmoe.core.errors import LeanMoeError
from leanmoe.core.installed_vllm import TESTED, check_version
from leanmoe.models.shape import MoEShape, read_shape
from leanmoe.plan import Plan
from leanmoe.serve import plan_support
from leanmoe.serve.routing_choice import implementation, is_plain
from leanmoe.serve.routing_statistics import Statistics
from leanmoe.serve.skipped_slots import Skipped
from leanmoe.serve.vllm import checks
from leanmoe.serve.vllm.grouped_steps import put as put_grouping
from leanmoe.serve.vllm.grouped_steps import why_not_group
from leanmoe.serve.vllm.layer_routing import LayerRouting
from leanmoe.serve.vllm.leanmoe_experts import OwnExperts, check_experts, weights_of
from leanmoe.serve.vllm.plugin import DROP
from leanmoe.serve.vllm.ranks import GATHERING, scope_of
from leanmoe.serve.vllm.skipping import Skipping, why_not_skip

logger = logging.getLogger("vllm.leanmoe")
"""Below vLLM's own, so that what it says is shown."""


class PlannedModel:
    """A model that vLLM builds in this process, and its layers under the plan."""

    def __init__(
        self,
        plan: Plan,
        config: Any,
        collect_stats: bool,
        *,
        cross_rank: bool = False,
        leanmoe_kernels: bool = False,
    ) -> None:
        """`cross_rank`: a token's company is that of all data-parallel ranks, not of its own;
        `leanmoe_kernels`: leanmoe's kernels compute the experts, not vLLM's.
        """
        self.config = weakref.ref(config)
        self.plan = plan
        self.leanmoe_kernels = leanmoe_kernels
        self.shape = shape_of(config.model_config.hf_config)
        plan.check(self.shape.fingerprint())
        self._cross_rank = cross_rank
        self.statistics = Statistics(plan.model.moe_layers) if collect_stats else None
        self.layers: dict[int, LayerRouting] = {}
        self.runners: dict[int, Any] = {}

    def adopt(self, runner: Any) -> None:
        """Puts the plan in the place of a layer's routing, unless it is no layer of the plan's."""
        index = decoder_index(runner.layer_name)
        if index not in self.shape.moe_layers:
            logger.info("leanmoe: %s is not in the plan, it runs as trained", runner.layer_name)
            return
        layer = self.shape.moe_layers.index(index)
        if layer in self.runners:
            raise LeanMoeError(
                f"vLLM built two MoE layers {index}: a model with a draft of its own kind cannot "
                "run under a plan; unset the speculative config"
            )
        self.runners[layer] = runner
        parallel = runner.moe_config
        share = (parallel.tp_rank, parallel.tp_size) if parallel.is_sequence_parallel else None
        routing = LayerRouting(
            runner.router,
            self.plan,
            layer,
            sequence_parallel=share,
            is_full_width=self._is_full_width(parallel),
            statistics=self.statistics,
            scope=scope_of(runner, self.plan.model.experts, self._cross_rank),
        )
        rules = routing.rules
        checks.check_ranks(runner, rules, self._cross_rank, self.config(), runner.layer_name)
        checks.check_router(runner.router, rules, self.plan.model.top_k, runner.layer_name)
        if all(rule.is_empty for rule in rules) and self.statistics is None:
            return
        if "_compute_routing" in vars(runner.router):
            raise LeanMoeError(f"{runner.layer_name}: its router is another layer's too")
        runner.router._compute_routing = routing
        self.layers[layer] = routing

    def check(self) -> None:
        """Refuses a loaded model of which not every layer can run under the plan."""
        config = self.config()
        checks.check_layers(
            sorted(self.shape.moe_layers[layer] for layer in self.runners),
            [index for index in self.shape.moe_layers if index in _own_layers(config)],
        )
        checks.check_padding(config, [r for routing in self.layers.values() for r in routing.rules])
        for layer, routing in self.layers.items():
            runner = self.runners[layer]
            checks.check_runner(runner, routing.rules, runner.layer_name)
        if self.leanmoe_kernels:
            for runner in self.runners.values():
                check_experts(runner, runner.layer_name)

    def settle(self) -> None:
        """Puts leanmoe's experts in place, if asked for, and settles how skipped slots are written.

        For a model that `check` has nothing against.
        """
        for layer, runner in self.runners.items():
            if self.leanmoe_kernels:
                OwnExperts(runner).put()
            if layer in self.layers:
                self.layers[layer].skipping = self._skipping(runner, self.layers[layer])

    def _skipping(self, runner: Any, routing: LayerRouting) -> Skipping:
        if all(map(is_plain, routing.rules)) or not routing.may_skip:
            return Skipping()
        if self.leanmoe_kernels:
            return Skipping(Skipped.BEYOND, Skipped.BEYOND)
        reason = why_not_skip(runner, routing.slots, self.plan.model.experts)
        if reason is None:
            if reason := why_not_group():
                logger.info("leanmoe: %s: small steps stay apart: %s", runner.layer_name, reason)
                return Skipping(small=Skipped.MINUS_ONE)
            put_grouping()
            return Skipping(small=Skipped.MINUS_ONE, groups=True)
        logger.info(
            "leanmoe: %s: a skipped slot repeats in small steps: %s", runner.layer_name, reason
        )
        return Skipping()

    def describe(self) -> str:
        """What runs, in one line."""
        runner = next(iter(self.runners.values()), None)
        method = None if runner is None else runner.routed_experts.quant_method
        experts = "none here" if method is None else checks.experts_class(method).__name__
        if runner is not None and self.leanmoe_kernels:
            from leanmoe.kernels.triton.tuned_tiles import describe

            experts = f"leanmoe, {describe(weights_of(runner.routed_experts))}"
        found = [f"{len(self.layers)} of {len(self.runners)} MoE layers under it"]
        found += [f"routing by {self._implementations()}", f"experts by {experts}"]
        ways = {routing.skipping.describe() for routing in self.layers.values()}
        found += [f"a skipped slot is {way}" for way in sorted(ways)]
        return ", ".join(found)

    def _implementations(self) -> str:
        import torch

        config = self.config()
        device = "cpu" if config is None else config.device_config.device
        logits = torch.empty(1, self.plan.model.experts, device=device)
        names = {
            "vllm"
            if is_plain(rule)
            else implementation(logits, routing.router, rule, routing.scope)
            for routing in self.layers.values()
            for rule in routing.rules
        }
        return " and ".join(sorted(names)) or "vllm"

    def _is_full_width(self, parallel: Any) -> bool:
        """Whether every step must have the model's own number of slots.

        Data-parallel ranks exchange their ids in kernels that may be made for one width; whoever
        asks for the experts of a reply gets them from a table of that width.
        """
        model = getattr(self.config(), "model_config", None)
        returned = getattr(model, "enable_return_routed_experts", False)
        gathers = parallel.moe_parallel_config.all2all_backend in GATHERING
        return bool((parallel.dp_size > 1 and not gathers) or returned)


def shape_of(config: Any) -> MoEShape:
    """The shape of a model from the config that vLLM has of it, overrides included."""
    return read_shape(config.to_dict())


def decoder_index(name: str) -> int:
    """The decoder layer of a MoE layer's name, like model.layers.3.mlp.experts."""
    found = re.search(r"\blayers?\.(\d+)\.", name) or re.search(r"\.(\d+)\.", name)
    if found is None:
        raise LeanMoeError(f"vLLM built a MoE layer {name!r}: its name has no layer number")
    return int(found[1])


class _Installed:
    """The plan of this process, and the model it is put to work in."""

    plan: Plan | None = None
    path = ""
    collect_stats = False
    cross_rank = False
    leanmoe_kernels = False
    model: PlannedModel | None = None


def current() -> PlannedModel | None:
    """The model that was built last in this process under a plan."""
    return _Installed.model


def install(
    path: str,
    drop: Sequence[str],
    collect_stats: bool = False,
    *,
    cross_rank: bool = False,
    leanmoe_kernels: bool = False,
) -> None:
    """Puts a plan to work in every model that vLLM builds in this process from now on.

    Raises LeanMoeError for a plan or a vLLM with which that cannot be. Called again, it changes
    the plan for models that are not built yet.
    """
    plan = plan_support.without(Plan.load(Path(path)), drop)
    plan_support.check_parts(plan, "vLLM", f"{DROP}={plan_support.PROMPT}")
    use(plan, path, collect_stats, cross_rank=cross_rank, leanmoe_kernels=leanmoe_kernels)


def use(
    plan: Plan,
    path: str = "",
    collect_stats: bool = False,
    *,
    cross_rank: bool = False,
    leanmoe_kernels: bool = False,
) -> None:
    """As `install`, for a plan that is no file."""
    import vllm

    check_version(vllm.__version__)
    if not _patched:
        _patch(vllm.__version__)
    _Installed.plan, _Installed.path, _Installed.collect_stats = plan, path, collect_stats
    _Installed.cross_rank, _Installed.leanmoe_kernels = cross_rank, leanmoe_kernels
    _Installed.model = None
    logger.info("leanmoe: plan %s read in process %d", path, os.getpid())


def stop() -> None:
    """Lets models that are built from now on run as they were trained."""
    _Installed.plan = _Installed.model = None


_patched: list[str] = []


def _patch(version: str) -> None:
    try:
        from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter
        from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
        from vllm.model_executor.model_loader.base_loader import BaseModelLoader
    except ImportError as error:
        raise LeanMoeError(
            f"vLLM {version} has no {error.name}, where a plan is put: install one of "
            f"{' to '.join(TESTED)}, or unset LEANMOE_PLAN"
        ) from error
    checks.check_hook(BaseRouter, version)
    _after(MoERunner, "__init__", lambda runner, *_: _adopt(runner))
    for loader in [BaseModelLoader, *_below(BaseModelLoader)]:
        if "load_model" in vars(loader):
            _after(loader, "load_model", lambda *_: _check())
    _patched.append(version)


def _after(owner: Any, name: str, then: Any) -> None:
    """Calls `then` with the object, and what the method gave, after each call of a method."""
    stock = vars(owner)[name]

    @functools.wraps(stock)
    def method(self: Any, *arguments: Any, **keywords: Any) -> Any:
        found = stock(self, *arguments, **keywords)
        then(self, found)
        return found

    setattr(owner, name, method)


def _below(parent: Any) -> list[Any]:
    found = []
    for child in parent.__subclasses__():
        found += [child, *_below(child)]
    return found


def _adopt(runner: Any) -> None:
    from vllm.config import get_current_vllm_config

    config = get_current_vllm_config()
    plan, model = _Installed.plan, _Installed.model
    if plan is None:
        return
    if _is_draft(config):
        logger.info("leanmoe: %s is a draft's, it runs as trained", runner.layer_name)
        return
    if model is None or model.config() is not config:
        model = _Installed.model = PlannedModel(
            plan,
            config,
            _Installed.collect_stats,
            cross_rank=_Installed.cross_rank,
            leanmoe_kernels=_Installed.leanmoe_kernels,
        )
        _mark_compiled(config, plan)
    model.adopt(runner)


def _is_draft(config: Any) -> bool:
    speculative = config.speculative_config
    draft = getattr(speculative, "draft_model_config", None)
    return draft is not None and config.model_config is draft


def _mark_compiled(config: Any, plan: Plan) -> None:
    """Lets vLLM keep what it compiled under a plan apart from what it compiles without."""
    import hashlib
    import json

    if isinstance(config.additional_config, dict):
        text = json.dumps(plan.to_json()["bands"], sort_keys=True)
        config.additional_config["leanmoe"] = hashlib.sha256(text.encode()).hexdigest()


def _check() -> None:
    model = _Installed.model
    if _Installed.plan is None:
        return
    if model is None:
        raise LeanMoeError(
            "vLLM built a model without MoE layers of its MoERunner: the plan does nothing there; "
            "unset LEANMOE_PLAN"
        )
    model.check()
    model.settle()
    logger.info("leanmoe: plan %s at work, %s", _Installed.path, model.describe())
    if line := _bands_between(model):
        logger.warning("leanmoe: %s", line)


def _bands_between(model: PlannedModel) -> str | None:
    """What happens to steps between a band's end and the next size that is captured."""
    config = model.config()
    compilation = getattr(config, "compilation_config", None)
    sizes = sorted(getattr(compilation, "cudagraph_capture_sizes", None) or [])
    ends = [band.up_to for band in model.plan.bands if band.up_to is not None]
    between = [end for end in ends if sizes and end < sizes[-1] and end not in sizes]
    if not between:
        return None
    return (
        f"bands end at {', '.join(map(str, between))}, which are no capture sizes: a step that is "
        "padded beyond a band's end runs under the next; add them to cudagraph_capture_sizes"
    )


def _own_layers(config: Any) -> range:
    """The decoder layers of this process's pipeline stage."""
    from vllm.distributed import get_pp_group
    from vllm.distributed.utils import get_pp_indices

    layers = config.model_config.hf_text_config.num_hidden_layers
    if config.parallel_config.pipeline_parallel_size == 1:
        return range(layers)
    group = get_pp_group()
    return range(*get_pp_indices(layers, group.rank_in_group, group.world_size))
