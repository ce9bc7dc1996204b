"""Where tiers and load control get into vLLM: its input processor and its engine core.

Every process of vLLM has both classes; requests pass the first in the API process, or in a script,
and the second runs where steps are made.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from leanmoe.core.environment import DROP
from leanmoe.core.errors import LeanMoeError
from leanmoe.plan import Plan
from leanmoe.serve.load_control import Slo
from leanmoe.serve.plugin_options import PROMPT, PluginOptions, check_parts, plan_paths, without
from leanmoe.serve.tiers import Tiers
from leanmoe.serve.vllm.engine_control import EngineControl, tier_of


class ControlHooks:
    """The tiers of a process, in every engine that vLLM makes in it from now on."""

    def __init__(self) -> None:
        self._tiers: Tiers | None = None
        self._make: Callable[[], EngineControl]
        self._is_patched = False
        self.engine: EngineControl | None = None
        """That of the engine core that was made last in this process."""

    def start(self, options: PluginOptions) -> None:
        """Puts plans to work that have tiers; raises LeanMoeError where they cannot."""
        tiers = tiers_of(options)
        slo = None if options.slo is None else Slo.parse(options.slo)
        names = tuple(path.stem for path in plan_paths(options.path))
        check_parts(tiers.family, "vLLM", f"{DROP}={PROMPT}")
        if not self._is_patched:
            self._patch()
        self._tiers, self._make = tiers, functools.partial(EngineControl, tiers, names, slo)
        self._make()  # what cannot be controlled is refused before a model is loaded

    def stop(self) -> None:
        """Leaves requests to engines that are made from now on as vLLM has them."""
        self._tiers = self.engine = None

    def _patch(self) -> None:
        try:
            from vllm.v1.engine.core import EngineCore
            from vllm.v1.engine.input_processor import InputProcessor
        except ImportError as error:
            raise LeanMoeError(
                f"this vLLM has no {error.name}, where tiers are read: install a version that "
                "leanmoe ran with, or unset LEANMOE_PLAN"
            ) from error
        check_signature(InputProcessor.process_inputs, "params")
        check_signature(EngineCore.preprocess_add_request, "request")
        process, begin = InputProcessor.process_inputs, EngineCore.__init__

        @functools.wraps(process)
        def process_inputs(self: Any, *arguments: Any, **keywords: Any) -> Any:
            request = process(self, *arguments, **keywords)
            check_request(hooks._tiers, request)
            return request

        @functools.wraps(begin)
        def made(self: Any, *arguments: Any, **keywords: Any) -> None:
            begin(self, *arguments, **keywords)
            if hooks._tiers is not None:
                hooks.engine = hooks._make()
                hooks.engine.attach(self)

        hooks = self
        InputProcessor.process_inputs, EngineCore.__init__ = process_inputs, made
        self._is_patched = True


@functools.cache
def process_control() -> ControlHooks:
    """The one of this process: vLLM's classes are patched once."""
    return ControlHooks()


def tiers_of(options: PluginOptions) -> Tiers:
    """What requests may ask for; raises LeanMoeError for plans that are of no one family."""
    plans = [without(Plan.load(path), options.drop) for path in plan_paths(options.path)]
    if options.has_tiers:
        return Tiers(tuple(plans), options.level)
    return Tiers((plans[0].at(options.level),), are_open=False)


def check_request(tiers: Tiers | None, request: Any) -> None:
    """Raises BadRequestError for an unknown tier, and for a salt that could be taken for leanmoe's.

    Where no plan is at work there is nothing to ask for, and nothing is checked.
    """
    if tiers is not None:
        tiers.salt(tier_of(tiers, request), request.cache_salt)


def check_signature(function: Callable[..., Any], parameter: str) -> None:
    """Refuses a vLLM one of whose functions takes other arguments than those that are read."""
    if parameter not in inspect.signature(function).parameters:
        raise LeanMoeError(
            f"vLLM's {function.__qualname__} takes no {parameter}: tiers cannot run there; install "
            "a version that leanmoe ran with, or unset LEANMOE_PLAN"
        )
