"""The load on vLLM: one server of `leanmoe serve` at a time, restarted for each variant.

Two engines rarely fit on a GPU, so variants alternate by repeat: each repeat starts every variant's
server once and runs all loads on it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from leanmoe.bench.measurement import Request
from leanmoe.bench.over_http import OverHTTP
from leanmoe.bench.prompts import Supply
from leanmoe.bench.server_process import ServerProcess, free_port
from leanmoe.bench.servers import Server
from leanmoe.bench.settings import BenchSettings, ServiceLoad
from leanmoe.bench.sweep import Outcome, plan_sha256
from leanmoe.core.errors import LeanMoeError
from leanmoe.core.installed_vllm import require_vllm
from leanmoe.models.reference import folder_of
from leanmoe.plan.named_plans import Named

FULL = "full"
SERVE = (sys.executable, "-m", "leanmoe", "serve")


class VLLMServer(OverHTTP):
    """Runs loads on a server of vLLM, which is started by a variant's first run."""

    restarts = True
    beside: frozenset[str] = frozenset()

    def __init__(
        self,
        model: str,
        plans: Mapping[str, Named],
        tokenizer: Any,
        settings: BenchSettings,
        supply: Supply,
    ) -> None:
        """The settings' `engine_args` come after ours, and so prevail.

        Raises LeanMoeError where vLLM, leanmoe's plugin in it, or GuideLLM is not installed.
        """
        self._model, self._plans = model, {FULL: None, **plans}
        self._vllm = require_vllm(bool(plans)).version
        self._port = free_port()
        url = f"http://127.0.0.1:{self._port}"
        super().__init__(
            [Server(name, url, model) for name in self._plans], tokenizer, settings, supply
        )
        self._running: ServerProcess | None = None
        self._runs = ""

    def describe(self) -> dict[str, Any]:
        """The engine, how it is started, and the client."""
        return {
            **super().describe(),
            "engine": f"vllm {self._vllm}, restarted for each repeat, over HTTP through GuideLLM "
            f"{self._version}",
            "devices": {"kind": "GPU", "count": self._gpus or 1},
            "model": {"name": self._model, "settings": {"arguments": self._arguments()}},
        }

    def variants(self) -> list[dict[str, Any]]:
        """Each variant with its plan's digest."""
        return [
            {"name": name, "plan_sha256": None if each is None else plan_sha256(each.plan)}
            for name, each in self._plans.items()
        ]

    def close(self) -> None:
        """Ends the server that runs."""
        if self._running is not None:
            self._running.close()
            self._running = None

    def _run_one(
        self, name: str, load: ServiceLoad, requests: Sequence[Request], seed: str
    ) -> Outcome:
        if self._running is None or self._runs != name:
            self.close()
            said = f"the vLLM server of {name}"
            self._running, self._runs = ServerProcess(said, self._command(self._plans[name])), name
            self._running.wait_for(self._servers[name])
        try:
            return super()._run_one(name, load, requests, seed)
        except LeanMoeError:
            self._running.check()  # what ended the server tells more than that it stopped answering
            raise

    def _command(self, variant: Named | None) -> list[str]:
        served = [self._model, "--engine", "vllm", "--port", str(self._port)]
        if variant is not None:
            served += ["--plan", str(variant.file)]
            served += [word for each in variant.plan.levels for word in ("--level", each.name)]
        return [*SERVE, *served, "--", *self._arguments()]

    def _arguments(self) -> list[str]:
        """What vLLM's server is told, besides the plan."""
        settings = self._settings
        most = max(load.concurrency or settings.max_concurrency for load in settings.loads())
        words = ["--no-enable-prefix-caching", "--max-model-len", str(self._supply.longest)]
        words += ["--max-num-seqs", str(most), "--dtype", settings.dtype or "auto"]
        words += ["--tensor-parallel-size", str(self._gpus or 1)]
        words += ["--tokenizer", folder_of(settings.tokenizer)] if settings.tokenizer else []
        words += ["--trust-remote-code"] if settings.trust_remote_code else []
        return [*words, *settings.engine_args]
