"""Transformers' own server, with continuous batching, for a model under a plan.

It is what `leanmoe serve` uses where vLLM is not installed.

Letters: T tokens (rows of a step), K slots of a token.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, NamedTuple

from leanmoe.core.errors import LeanMoeError, shown
from leanmoe.plan import Plan
from leanmoe.serve.metrics import exposition

PACKAGES = "fastapi, uvicorn, openai and accelerate: pip install 'transformers[serving]' accelerate"
NO_END = -1
"""An end-of-sequence id that no token has: continuous batching takes it for "never stop"."""
CACHE_SECONDS = 60.0
"""At most so long the first request waits for the cache to be made."""
CPU_CACHE_BYTES = 1 << 30
"""Memory for keys and values on a CPU; `leanmoe serve` gives vLLM as much there."""


class EngineStep(NamedTuple):
    """What one forward step ran."""

    routing: Any
    """The `RoutingStatistics` of this step alone."""
    rows: int
    read: int
    """Rows whose prediction is read: one for each sequence that gets a token."""


class PlannedServer:
    """Puts a plan to work in the model that Transformers' server loads."""

    def __init__(self, plan: Plan, path: str) -> None:
        self.plan, self._path = plan, path
        self._context: Any = None
        self._running: EngineStep | None = None
        self._last: EngineStep | None = None
        self._generated = 0

    def apply(self, model: Any) -> Any:
        """The model, under the plan until the process ends."""
        from leanmoe.runtime import apply, batching_reason

        if reason := batching_reason(model):
            raise LeanMoeError(f"{reason}: serve it with vLLM")
        widen_cached_heads(model.config)
        model.register_forward_pre_hook(self._begin, with_kwargs=True)
        model.register_forward_hook(self._end)
        self._context = apply(model, self.plan, experts="leanmoe", observe=self._note)
        applied = self._context.__enter__()
        what = f"plan {self._path} at work" if self._path else "the full model, no plan"
        print(f"leanmoe: {what}, experts run by {applied.implementation}", flush=True)
        return model

    def metrics(self) -> str:
        """Prometheus' text about the last step; reading it waits for the device."""
        step, report = self._last, None
        if step is not None:
            report = {**step.routing.read().to_json(), **self._band(step), "rows": step.rows}
        return exposition(self._path, "transformers", report, self._generated)

    def _begin(self, _model: Any, inputs: Any, keywords: dict[str, Any]) -> None:
        from leanmoe.serve.routing_statistics import RoutingStatistics

        tokens = keywords.get("input_ids", inputs[0] if inputs else None)
        rows = 0 if tokens is None else int(tokens.numel())
        keep = keywords.get("logits_to_keep")
        read = rows if keep is None or isinstance(keep, int) else int(keep.numel())
        model = self.plan.model
        routing = RoutingStatistics(model.moe_layers, model.experts)
        self._running = EngineStep(routing, rows, read)

    def _note(self, layer: int, ids_TK: Any, weights_TK: Any) -> None:
        if self._running is not None:
            self._running.routing.note(layer, ids_TK, weights_TK, None)

    def _end(self, _model: Any, _inputs: Any, _output: Any) -> None:
        self._last = self._running
        self._generated += 0 if self._running is None else self._running.read

    def _band(self, step: EngineStep) -> dict[str, Any]:
        """The band of a step; under a plan with rules for prompt rows, the other rows decide it."""
        band = self.plan.band_for(max(1, step.read if self.plan.prompt else step.rows))
        return {
            "band": None if band is None else self.plan.bands.index(band),
            "up_to": None if band is None else band.up_to,
        }


def widen_cached_heads(config: Any) -> None:
    """Tells continuous batching how wide a cached head of DeepSeek's attention is.

    The cache takes `head_dim` for its width, which Transformers sets to the rotary part of MLA.
    """
    whole = getattr(config, "qk_head_dim", None)
    if whole is not None:
        config.head_dim = whole


def cache_share() -> float | None:
    """The share of memory that continuous batching may take; None leaves it to Transformers.

    On a CPU it would take 90% of the machine's memory, even of what other processes use.
    """
    import torch

    if torch.cuda.is_available():
        return None
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(0.5, CPU_CACHE_BYTES / whole)


def serve(model: str, name: str, plan: Plan, path: str, host: str, port: int) -> None:
    """Serves a model until it is interrupted; raises LeanMoeError where a package is missing.

    Args:
        model: the folder or hub name that weights are loaded from.
        name: what requests call it, as well as `model`.
        plan: an empty one serves the full model, also on leanmoe's kernels.
        path: the plan's file, for the metrics; empty without one.
    """
    try:
        from transformers.cli.serve import Serve
        from transformers.cli.serving import server
        from transformers.cli.serving.model_manager import ModelManager
        from transformers.cli.serving.utils import BaseHandler, CBGenerateManager
        from transformers.utils.import_utils import is_serve_available
    except ImportError as error:
        raise _missing(error.name or "a package") from error
    if not is_serve_available() or find_spec("accelerate") is None:
        raise LeanMoeError(f"Transformers' server needs {PACKAGES}")
    planned = PlannedServer(plan, path)
    load, build = ModelManager._load_model, server.build_server

    def load_model(self: Any, *arguments: Any, **keywords: Any) -> Any:
        return planned.apply(load(self, *arguments, **keywords))

    def build_server(*arguments: Any, **keywords: Any) -> Any:
        from fastapi.responses import JSONResponse, PlainTextResponse
        from jinja2 import TemplateError

        def answer_bad_request(_request: Any, error: Exception) -> Any:
            return JSONResponse({"error": {"message": str(error), "code": 400}}, 400)

        app = build(*arguments, **keywords)
        for kind in (ValueError, TypeError, KeyError, TemplateError):
            app.add_exception_handler(kind, answer_bad_request)
        app.add_api_route("/metrics", lambda: PlainTextResponse(planned.metrics()))
        return app

    def models(*_: Any) -> list[dict[str, Any]]:
        return [{"id": name, "object": "model", "created": 0, "owned_by": "leanmoe", "root": model}]

    with _replaced(
        (ModelManager, "_load_model", load_model),
        (ModelManager, "get_gen_models", staticmethod(models)),
        (server, "build_server", build_server),
        *_request_changes(BaseHandler, model, name),
        *_length_changes(CBGenerateManager),
    ):
        # A captured step would keep its first band, and its padding would ask for experts.
        Serve(
            force_model=model,
            continuous_batching=True,
            cb_use_cuda_graph=False,
            cb_max_memory_percent=cache_share(),
            host=host,
            port=port,
        )


def _missing(module: str) -> LeanMoeError:
    """The error for a module that Transformers' server imports: its own, or a package's."""
    if module.split(".")[0] == "transformers":
        return LeanMoeError(f"this Transformers has no server ({module}): 5.17 has")
    return LeanMoeError(f"Transformers' server needs {module.split('.')[0]}, and {PACKAGES}")


def bad_request(body: dict[str, Any], tokenizer: Any) -> str | None:
    """What is wrong with a request that Transformers' server would fail on; None for a good one."""
    if "messages" in body or "input" in body:
        if getattr(tokenizer, "chat_template", None) is None:
            return "the model's tokenizer has no chat template: send prompts to /v1/completions"
        if body.get("messages") == [] or body.get("input") in ([], ""):
            return "the request holds no message"
    most = body.get("max_tokens", body.get("max_completion_tokens"))
    if most is not None and (not isinstance(most, int) or most < 1):
        return f"max_tokens is {shown(most)}: it must be a whole number, 1 or more"
    return None


def _request_changes(handler: Any, model: str, name: str) -> list[tuple[Any, str, Any]]:
    """Changes by which Transformers' handlers accept the served name and `ignore_eos`.

    `ignore_eos` is vLLM's field of a request; load generators send it so that every reply has its
    length. A bad request is answered with HTTP 400.
    """
    resolve, validate = handler._resolve_model, handler._validate_request
    configure = handler._build_generation_config

    def resolve_model(self: Any, body: dict[str, Any]) -> Any:
        if body.get("model") == name:
            body["model"] = model
        found = resolve(self, body)
        processor = found[2]
        if reason := bad_request(body, getattr(processor, "tokenizer", processor)):
            raise _refused(reason)
        return found

    def validate_request(self: Any, body: dict[str, Any]) -> None:
        validate(self, {key: value for key, value in body.items() if key != "ignore_eos"})

    def build_generation_config(
        self: Any, body: dict[str, Any], *arguments: Any, **keywords: Any
    ) -> Any:
        generation = configure(self, body, *arguments, **keywords)
        if body.get("ignore_eos"):
            generation.eos_token_id = NO_END
        return generation

    return [
        (handler, "_resolve_model", resolve_model),
        (handler, "_validate_request", validate_request),
        (handler, "_build_generation_config", build_generation_config),
    ]


def longest_request(model: Any, batching: Any) -> int | None:
    """Tokens of prompt and reply that one request may have; None where nothing limits them.

    `batching` is Transformers' running manager of continuous batching, which makes its cache in a
    thread of its own. Raises LeanMoeError where the cache could not be made.
    """
    until = time.monotonic() + CACHE_SECONDS
    while batching.batch_processor is None and time.monotonic() < until:
        if (error := batching.background_thread_status.fatal_error) is not None:
            raise LeanMoeError(f"continuous batching did not start: {error}")
        time.sleep(0.05)
    found = [getattr(model.config.get_text_config(), "max_position_embeddings", None)]
    if batching.batch_processor is not None:
        found.append(batching.batch_processor.cache.max_tokens_read)
    return min((each for each in found if each is not None), default=None)


def _length_changes(manager: Any) -> list[tuple[Any, str, Any]]:
    """Changes by which a request without tokens, or with too many, is answered with HTTP 400.

    Either ends Transformers' continuous batching, for every request after it too.
    """

    def checked(generate: Callable[..., Any]) -> Callable[..., Any]:
        def checking(
            self: Any, model: Any, processor: Any, inputs: Any, generation: Any, **keywords: Any
        ) -> Any:
            prompt, reply = len(inputs["input_ids"]), generation.max_new_tokens or 0
            if not prompt:
                raise _refused("the prompt has no tokens")
            most = longest_request(model, self._cb)
            if most is not None and prompt + reply > most:
                raise _refused(
                    f"the prompt has {prompt:,} tokens and max_tokens is {reply:,}: this server "
                    f"takes {most:,} together"
                )
            return generate(self, model, processor, inputs, generation, **keywords)

        return checking

    names = ("generate_streaming", "generate_non_streaming")
    return [(manager, name, checked(getattr(manager, name))) for name in names]


def _refused(reason: str) -> Any:
    """What FastAPI answers with HTTP 400."""
    from fastapi import HTTPException

    return HTTPException(400, reason)


@contextmanager
def _replaced(*changes: tuple[Any, str, Any]) -> Iterator[None]:
    """Sets attributes, each given as (owner, name, value), inside the `with`."""
    before = [(owner, name, vars(owner)[name]) for owner, name, _ in changes]
    for owner, name, value in changes:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)
