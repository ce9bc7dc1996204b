"""leanmoe's plugin in one process of vLLM: it finds the MoE layers of the models that are built.

`planned_model` puts the plan into a model; this file puts itself behind two of vLLM's methods.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
from collections.abc import Callable
from importlib import import_module
from typing import Any

from leanmoe.core.errors import LeanMoeError
from leanmoe.core.installed_vllm import TESTED, check_version
from leanmoe.plan import Plan
from leanmoe.serve.plugin_options import PluginOptions
from leanmoe.serve.vllm.checks import check_hook
from leanmoe.serve.vllm.padding import RUNNERS, is_v2
from leanmoe.serve.vllm.padding_watch import watch_runner
from leanmoe.serve.vllm.planned_model import PlannedModel

logger = logging.getLogger("vllm.leanmoe")
"""Its name is below vLLM's own, so that vLLM shows what it says."""


class VllmPlugin:
    """The plan of a process, and the model that vLLM built last under it."""

    def __init__(self) -> None:
        self._plan: Plan | None = None
        self._options = PluginOptions()
        self._is_patched = False
        self._watched: set[Any] = set()
        self.model: PlannedModel | None = None
        """The model that was built last under the plan; None before one is."""

    def start(self, plan: Plan, options: PluginOptions) -> None:
        """Puts a plan to work in every model that vLLM builds in this process from now on.

        Called again, it changes the plan for models that are not built yet. Raises LeanMoeError
        for a vLLM in which a plan cannot run.
        """
        import vllm

        check_version(vllm.__version__)
        if not self._is_patched:
            self._patch(vllm.__version__)
        self._plan, self._options, self.model = plan, options, None
        logger.info("leanmoe: plan %s read in process %d", options.path, os.getpid())

    def stop(self) -> None:
        """Lets models that are built from now on run as they were trained."""
        self._plan = self.model = None

    def _patch(self, version: str) -> None:
        try:
            from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter
            from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
            from vllm.model_executor.model_loader.base_loader import BaseModelLoader
        except ImportError as error:
            raise LeanMoeError(
                f"vLLM {version} has no {error.name}, where a plan is put: install one of "
                f"{' to '.join(TESTED)}, or unset LEANMOE_PLAN"
            ) from error
        check_hook(BaseRouter, version)
        _call_after(MoERunner, "__init__", self._adopt)
        for loader in [BaseModelLoader, *_subclasses(BaseModelLoader)]:
            if "load_model" in vars(loader):
                _call_after(loader, "load_model", lambda _loader: self._check())
        self._is_patched = True

    def _adopt(self, runner: Any) -> None:
        """Takes a MoE layer that vLLM has built, into the model that it is building."""
        from vllm.config import get_current_vllm_config

        config = get_current_vllm_config()
        if self._plan is None:
            return
        if _is_draft(config):
            logger.info("leanmoe: %s is a draft's, it runs as trained", runner.layer_name)
            return
        if self.model is None or self.model.config() is not config:
            self.model = PlannedModel(self._plan, config, self._options)
            _tell_compile_cache(config, self._plan)
        self.model.adopt(runner)

    def _check(self) -> None:
        """Refuses a loaded model that cannot run under the plan, and says what runs otherwise."""
        if self._plan is None:
            return
        if self.model is None:
            raise LeanMoeError(
                "vLLM built a model without MoE layers of its MoERunner: the plan does nothing "
                "there; unset LEANMOE_PLAN"
            )
        self.model.check()
        self.model.settle()
        self._watch()
        logger.info("leanmoe: plan %s at work, %s", self._options.path, self.model.describe())
        if warning := self.model.uncaptured_bands():
            logger.warning("leanmoe: %s", warning)

    def _watch(self) -> None:
        """Has the model runner that is at work compare its padding with what the layers read."""
        if self.model is None or self.model.watch is None:
            return
        runner = import_module(RUNNERS[is_v2(self.model.config())]).GPUModelRunner
        if runner not in self._watched:
            self._watched.add(runner)
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


def _subclasses(parent: Any) -> list[Any]:
    """All classes below a class, at any depth."""
    children = parent.__subclasses__()
    return [each for child in children for each in (child, *_subclasses(child))]


def _is_draft(config: Any) -> bool:
    speculative = config.speculative_config
    draft = getattr(speculative, "draft_model_config", None)
    return draft is not None and config.model_config is draft


def _tell_compile_cache(config: Any, plan: Plan) -> None:
    """Lets vLLM keep what it compiled under a plan apart from what it compiles without one."""
    if isinstance(config.additional_config, dict):
        text = json.dumps(plan.to_json()["bands"], sort_keys=True)
        config.additional_config["leanmoe"] = hashlib.sha256(text.encode()).hexdigest()
