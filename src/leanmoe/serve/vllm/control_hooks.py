"""Where tiers and load control get into vLLM: its input processor and its engine core.

Requests pass the first in the API process, or in a script; the second runs where steps are made.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from typing import Any

from leanmoe.core.environment import DROP
from leanmoe.core.errors import LeanMoeError
from leanmoe.serve.load_control import Slo
from leanmoe.serve.plugin_options import PROMPT, PluginOptions, check_parts, plan_names
from leanmoe.serve.tiers import BadRequestError, Tiers, tiers_of
from leanmoe.serve.vllm.engine_control import STATE, EngineControl, tier_of
from leanmoe.serve.vllm.patch import process_plugin


class ControlHooks:
    """The tiers of a process, in every engine that vLLM makes in it from now on."""

    def __init__(self) -> None:
        self._tiers: Tiers | None = None
        self._make: Callable[[], EngineControl]
        self._is_patched = False
        self._lock = threading.Lock()
        """Requests come in a thread of their own."""
        self.engine: EngineControl | None = None
        """That of the engine core that was made last in this process."""

    def start(self, options: PluginOptions) -> None:
        """Puts plans to work that have tiers; raises LeanMoeError where they cannot."""
        tiers = tiers_of(options)
        slo = None if options.slo is None else Slo.parse(options.slo)
        check_parts(tiers.family, "vLLM", f"{DROP}={PROMPT}")
        if not self._is_patched:
            self._patch()
        self._tiers, self._make = (
            tiers,
            functools.partial(
                EngineControl, tiers, plan_names(options.path), slo, options.cross_rank
            ),
        )
        if options.has_tiers:
            process_plugin().start(tiers.family, options, tiers.levels_of)
        self._make()  # what cannot be controlled is refused before a model is loaded

    def stop(self) -> None:
        """Leaves requests to engines that are made from now on as vLLM has them."""
        self._tiers = self.engine = None

    def _patch(self) -> None:
        try:
            from vllm.v1.engine.core import DPEngineCoreProc, EngineCore, EngineCoreProc
            from vllm.v1.engine.input_processor import InputProcessor
        except ImportError as error:
            raise LeanMoeError(
                f"this vLLM has no {error.name}, where tiers are read: install a version that "
                "leanmoe ran with, or unset LEANMOE_PLAN"
            ) from error
        check_signature(InputProcessor.process_inputs, "params")
        check_signature(EngineCore.preprocess_add_request, "request")
        process, preprocess = InputProcessor.process_inputs, EngineCore.preprocess_add_request

        @functools.wraps(process)
        def process_inputs(processor: Any, *arguments: Any, **keywords: Any) -> Any:
            request = process(processor, *arguments, **keywords)
            check_request(self._tiers, request)
            return request

        @functools.wraps(preprocess)
        def preprocess_add_request(core: Any, request: Any) -> Any:
            if self._attach(core):
                return core.preprocess_add_request(request)  # it is the control's now
            return preprocess(core, request)

        InputProcessor.process_inputs = process_inputs
        EngineCore.preprocess_add_request = preprocess_add_request
        for kind in (EngineCore, EngineCoreProc, DPEngineCoreProc):
            for name in {"__init__", "run_busy_loop"} & set(vars(kind)):
                self._attach_around(kind, name)
        self._is_patched = True

    def _attach_around(self, kind: Any, name: str) -> None:
        """Attaches after a core is made, or before its loop begins.

        A core in a process of its own loads plugins while it is made: the first is too late then.
        """
        stock = vars(kind)[name]

        @functools.wraps(stock)
        def method(core: Any, *arguments: Any, **keywords: Any) -> Any:
            if name != "__init__":
                self._attach(core)
            returned = stock(core, *arguments, **keywords)
            if name == "__init__":
                self._attach(core)
            return returned

        setattr(kind, name, method)

    def _attach(self, core: Any) -> bool:
        """Puts a control of its own around an engine core; whether it had none before."""
        with self._lock:
            if self._tiers is None or hasattr(core, STATE):
                return False
            self.engine = self._make()
            self.engine.attach(core)
            return True


@functools.cache
def process_control() -> ControlHooks:
    """The one of this process: vLLM's classes are patched once."""
    return ControlHooks()


def check_request(tiers: Tiers | None, request: Any) -> None:
    """Refuses an unknown tier, and a salt that could be taken for leanmoe's."""
    if tiers is None:
        return
    try:
        tiers.salt(tier_of(tiers, request), request.cache_salt)
    except BadRequestError as error:
        raise _clients_fault(error) from error


def _clients_fault(error: BadRequestError) -> Exception:
    """What vLLM answers with HTTP 400: its own error, where it has one, else any ValueError."""
    try:
        from vllm.exceptions import VLLMValidationError
    except ImportError:
        return error
    refusal: Exception = VLLMValidationError(str(error))
    return refusal


def check_signature(function: Callable[..., Any], parameter: str) -> None:
    """Refuses a vLLM one of whose functions takes other arguments than those that are read."""
    if parameter not in inspect.signature(function).parameters:
        raise LeanMoeError(
            f"vLLM's {function.__qualname__} takes no {parameter}: tiers cannot run there; install "
            "a version that leanmoe ran with, or unset LEANMOE_PLAN"
        )
