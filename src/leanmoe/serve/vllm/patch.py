"""leanmoe's plugin in one process of vLLM: it finds the MoE layers of the models that are built.

`planned_model` puts the plan into a model; this file puts itself around vLLM's methods that build
layers, load models and run steps.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from leanmoe.core.errors import LeanMoeError
from leanmoe.core.installed_vllm import RAN, check_version
from leanmoe.core.schema import to_json
from leanmoe.plan import Plan
from leanmoe.serve.plugin_options import PluginOptions, has_prompt_rules
from leanmoe.serve.vllm.installation import check_hooks, check_rows, files_of_vllm, naming, version
from leanmoe.serve.vllm.padding import RUNNERS, is_v2, watch_runner
from leanmoe.serve.vllm.planned_model import PlannedModel
from leanmoe.serve.vllm.rule_rows import Levels, follow_v1, follow_v2

logger = logging.getLogger("vllm.leanmoe")
"""Its name is below vLLM's own, so that vLLM shows what it says."""
MONOLITHIC = "supports_monolithic_kernels"
"""What vLLM 0.33 asks of a router before it picks kernels that choose experts themselves."""


class VllmPlugin:
    """The plan of a process, and the model that vLLM built last under it."""

    def __init__(self) -> None:
        self._plan: Plan | None = None
        self._options = PluginOptions()
        self._levels: Levels | None = None
        self._is_patched = False
        self._attended: set[Any] = set()
        self._followed: set[Any] = set()
        self._is_building = False
        self._target: PlannedModel | None = None
        """The model that is being built under the plan; None in between, and for a draft."""
        self._drafted = 0
        self.model: PlannedModel | None = None
        """The model that was built last under the plan; None before one is."""

    def start(self, plan: Plan, options: PluginOptions, levels: Levels | None = None) -> None:
        """Puts a plan to work in every model that vLLM builds in this process from now on.

        `levels` says those of requests; None is for a plan of one level. Called again, it changes
        the plan for models that are not built yet. Raises LeanMoeError for a vLLM in which a plan
        cannot run.
        """
        check_version(version())
        if not self._is_patched:
            logger.info("leanmoe: %s", check_hooks(version(), files_of_vllm()))
            self._patch()
        if has_prompt_rules(plan) or levels is not None:
            check_rows(version(), files_of_vllm())
        self._plan, self._options, self.model = plan, options, None
        self._levels = levels
        logger.info("leanmoe: plan %s read in process %d", options.path, os.getpid())

    def stop(self) -> None:
        """Lets models that are built from now on run as they were trained."""
        self._plan = self.model = None

    def _patch(self) -> None:
        try:
            from vllm.model_executor.layers.fused_moe.router.fused_moe_router import FusedMoERouter
            from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
            from vllm.model_executor.model_loader.base_loader import BaseModelLoader
        except ImportError as error:
            raise LeanMoeError(
                f"vLLM {version()} has no {error.name}, where a plan is put: install one of "
                f"{', '.join(RAN)}, or unset LEANMOE_PLAN"
            ) from error
        _call_after(MoERunner, "__init__", self._adopt)
        if MONOLITHIC in vars(FusedMoERouter):
            stock = vars(FusedMoERouter)[MONOLITHIC]
            asked = property(lambda router: stock.__get__(router) and not self._chooses_experts())
            setattr(FusedMoERouter, MONOLITHIC, asked)
        for loader in [BaseModelLoader, *_subclasses(BaseModelLoader)]:
            if "load_model" in vars(loader):
                _call_within(loader, "load_model", self._building)
        self._is_patched = True

    @contextmanager
    def _building(
        self, vllm_config: Any, model_config: Any, *_others: Any, **_more: Any
    ) -> Iterator[None]:
        """While vLLM builds and loads a model: its layers are adopted, and checked at the end.

        A draft's layers are not: what it proposes is verified under the plan. A loader that calls
        another's method is within its own.
        """
        if self._plan is None or self._is_building:
            yield
            return
        self._is_building, self._drafted = True, 0
        try:
            if not is_draft(vllm_config, model_config):
                self.model = self._target = PlannedModel(
                    self._plan, vllm_config, self._options, self._levels
                )
                _tell_compile_cache(vllm_config, self._plan)
            yield
            if self._target is None:
                logger.info("leanmoe: a draft of %d MoE layers runs as trained", self._drafted)
            else:
                self._check(self._target)
        except LeanMoeError as error:
            raise naming(error, version()) from error
        finally:
            self._is_building, self._target = False, None

    def _adopt(self, runner: Any) -> None:
        """Takes a MoE layer that vLLM has built, into the model that it is building."""
        if self._plan is None:
            return
        if not self._is_building:
            raise LeanMoeError(
                f"vLLM {version()} builds {runner.layer_name} by a model loader that leanmoe does "
                "not know: set another --load-format, or unset LEANMOE_PLAN"
            )
        if self._target is not None:
            self._target.adopt(runner)
        self._drafted += 1

    def _chooses_experts(self) -> bool:
        """Whether the plan chooses the experts of the model that is being built."""
        return self._target is not None and self._target.chooses_experts

    def _check(self, model: PlannedModel) -> None:
        """Refuses a loaded model that cannot run under the plan, and says what runs otherwise."""
        model.check()
        model.settle()
        self._attend(model.config())
        self._follow(model)
        logger.info("leanmoe: plan %s at work, %s", self._options.path, model.describe())
        if warning := model.uncaptured_bands():
            logger.warning("leanmoe: %s", warning)

    def _warm_up(self, _runner: Any) -> None:
        if self.model is not None:
            self.model.warm_up()

    def _follow(self, model: PlannedModel) -> None:
        """Has the model runner at work fill the rule rows, where the plan needs them."""
        config = model.config()
        runner = import_module(RUNNERS[is_v2(config)]).GPUModelRunner
        if model.rule_rows is not None and runner not in self._followed:
            self._followed.add(runner)
            follow = follow_v2 if is_v2(config) else follow_v1
            follow(runner, lambda: None if self.model is None else self.model.rule_rows)

    def _attend(self, config: Any) -> None:
        """Has the model runner at work compare its padding, and compile all before it serves."""
        runner = import_module(RUNNERS[is_v2(config)]).GPUModelRunner
        if runner not in self._attended:
            self._attended.add(runner)
            _call_after(runner, "profile_run", self._warm_up)
            watch_runner(runner, lambda: None if self.model is None else self.model.watch)


@functools.cache
def process_plugin() -> VllmPlugin:
    """The one plugin of this process.

    vLLM's classes are patched once a process, and its workers are asked of the plan by name alone:
    so there is one, which they all find here.
    """
    return VllmPlugin()


def _call_after(owner: Any, name: str, then: Callable[[Any], None]) -> None:
    """Calls `then` with the object after each call of a method."""
    stock = vars(owner)[name]

    @functools.wraps(stock)
    def method(self: Any, *arguments: Any, **keywords: Any) -> Any:
        returned = stock(self, *arguments, **keywords)
        then(self)
        return returned

    setattr(owner, name, method)


def _call_within(owner: Any, name: str, context: Callable[..., Any]) -> None:
    """Makes each call of a method within a context that is given its arguments."""
    stock = vars(owner)[name]

    @functools.wraps(stock)
    def method(self: Any, *arguments: Any, **keywords: Any) -> Any:
        with context(*arguments, **keywords):
            return stock(self, *arguments, **keywords)

    setattr(owner, name, method)


def _subclasses(parent: Any) -> list[Any]:
    """All classes below a class, at any depth."""
    children = parent.__subclasses__()
    return [each for child in children for each in (child, *_subclasses(child))]


def is_draft(vllm_config: Any, model_config: Any) -> bool:
    """Whether the model that vLLM loads speculates for another.

    Not its config says so, which may be a copy of the target's, but the model config that the
    loader is given. A draft without a model, like n-grams, has the target's own.
    """
    speculative = vllm_config.speculative_config
    draft = getattr(speculative, "draft_model_config", None)
    is_target = model_config is getattr(speculative, "target_model_config", None)
    return draft is not None and model_config is draft and not is_target


def _tell_compile_cache(config: Any, plan: Plan) -> None:
    """Lets vLLM keep what it compiled under a plan apart from what it compiles without one."""
    if isinstance(config.additional_config, dict):
        rules = [[to_json(level.bands), to_json(level.prompt)] for level in plan.levels]
        text = json.dumps(rules, sort_keys=True)
        config.additional_config["leanmoe"] = hashlib.sha256(text.encode()).hexdigest()
