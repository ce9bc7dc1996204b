"""Transformers' own server, with continuous batching, for a model under a plan.

It is what `leanmoe serve` uses where vLLM is not installed.
"""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import Any

from leanmoe.engines.metrics import TokenRate, exposition
from leanmoe.errors import LeanMoeError
from leanmoe.plan import Plan

logger = logging.getLogger(__name__)
PACKAGES = "fastapi, uvicorn, openai and accelerate: pip install 'transformers[serving]' accelerate"


class PlannedServer:
    """Puts a plan to work in the model that Transformers' server loads."""

    def __init__(self, plan: Plan, path: str) -> None:
        self.plan, self._path = plan, path
        self._applied: Any = None
        self._context: Any = None
        self._rate = TokenRate()

    def apply(self, model: Any) -> Any:
        """The model, under the plan until the process ends."""
        from leanmoe.runtime import apply

        widen_cached_heads(model.config)
        self._context = apply(model, self.plan, experts="leanmoe", count=True)
        self._applied = self._context.__enter__()
        logger.info("plan %s at work, experts run by %s", self._path, self._applied.implementation)
        return model

    def metrics(self) -> str:
        """Prometheus' text: means over all steps so far, per layer."""
        if self._applied is None:
            return exposition(self._path, "transformers", None, None)
        counts = self._applied.generated
        tokens = counts[0].tokens if counts else 0
        step = {
            "rows": tokens / max(counts[0].steps, 1) if counts else 0,
            **_band(self.plan, counts),
            "layers": [
                {"distinct": layer.distinct_per_step, "activated": layer.slots_per_token}
                for layer in counts
            ],
        }
        rate = self._rate.per_second(tokens)
        return exposition(self._path, "transformers", step, rate, of="the mean of all steps")


def widen_cached_heads(config: Any) -> None:
    """Tells continuous batching how wide a cached head of DeepSeek's is, for as long as it serves.

    Its cache is as wide as `head_dim`, which Transformers sets to the rotary part of MLA. Raises
    LeanMoeError where keys and values differ in width: the cache holds one width.
    """
    whole = getattr(config, "qk_head_dim", None)
    if whole is None:
        return
    if whole != config.v_head_dim:
        raise LeanMoeError(
            f"this model caches keys {whole} wide and values {config.v_head_dim} wide: "
            "Transformers' continuous batching cannot serve it; serve it with vLLM"
        )
    config.head_dim = whole


def _band(plan: Plan, counts: Any) -> dict[str, Any]:
    """The band of a step of the mean size: Transformers tells steps apart only while they run."""
    mean = max(1, round(counts[0].tokens / max(counts[0].steps, 1))) if counts else 1
    band = plan.band_for(mean)
    return {
        "band": None if band is None else plan.bands.index(band),
        "up_to": None if band is None else band.up_to,
    }


def serve(model: str, plan: Plan, path: str, host: str, port: int) -> None:
    """Serves until interrupted; raises LeanMoeError where a package is missing."""
    try:
        from transformers.cli.serve import Serve
        from transformers.cli.serving import server
        from transformers.cli.serving.model_manager import ModelManager
        from transformers.utils.import_utils import is_serve_available
    except ImportError as error:
        raise LeanMoeError(f"this Transformers has no server ({error.name}): 5.17 has") from error
    if not is_serve_available() or find_spec("accelerate") is None:
        raise LeanMoeError(f"Transformers' server needs {PACKAGES}")
    planned = PlannedServer(plan, path)
    load, build = ModelManager._load_model, server.build_server

    def load_model(self: Any, *arguments: Any, **keywords: Any) -> Any:
        return planned.apply(load(self, *arguments, **keywords))

    def build_server(*arguments: Any, **keywords: Any) -> Any:
        from fastapi.responses import PlainTextResponse

        app = build(*arguments, **keywords)
        app.add_api_route("/metrics", lambda: PlainTextResponse(planned.metrics()))
        return app

    ModelManager._load_model, server.build_server = load_model, build_server
    try:
        Serve(force_model=model, continuous_batching=True, host=host, port=port)
    finally:
        ModelManager._load_model, server.build_server = load, build
