"""The load on vLLM's offline engine: one engine process at a time, restarted for each variant."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from leanmoe.bench.metrics import Request, Timeline
from leanmoe.bench.prompts import Supply
from leanmoe.bench.settings import BenchSettings, ServiceLoad
from leanmoe.bench.sweep import Outcome, RunOne
from leanmoe.core.environment import PLAN
from leanmoe.core.errors import LeanMoeError
from leanmoe.core.installed_vllm import require_vllm
from leanmoe.plan import Plan

FULL = "full"
SECONDS_TO_LEAVE = 30.0
WORKER = [sys.executable, "-m", "leanmoe.bench.vllm_worker"]


class VLLMOffline:
    """Runs loads on vLLM, the plan in LEANMOE_PLAN of the engine's process.

    Two engines rarely fit on a GPU, so variants alternate by repeat: each repeat starts every
    variant's engine once and runs all loads on it.
    """

    restarts = True

    def __init__(
        self,
        model: str,
        plans: Mapping[str, Path],
        settings: BenchSettings,
        supply: Supply,
        gpus: int = 1,
        dtype: str | None = None,
        trust_remote_code: bool = False,
        engine_args: Mapping[str, Any] | None = None,
    ) -> None:
        """`engine_args` are passed to `vllm.LLM` over ours, and stored with the results.

        Raises LeanMoeError where vLLM, or leanmoe's plugin in it, is not installed."""
        self._model, self._supply, self._settings = model, supply, settings
        self._plans: dict[str, Path | None] = {FULL: None, **plans}
        self._version = require_vllm(bool(plans)).version
        self._engine = {
            "model": model_folder(model),
            "tensor_parallel_size": gpus,
            "dtype": dtype or "auto",
            "trust_remote_code": trust_remote_code,
            "max_model_len": supply.longest,
            "max_num_seqs": max((load.concurrency or 1) for load in settings.loads()),
            **(engine_args or {}),
        }
        self._gpus = gpus
        self._running: _Engine | None = None

    def describe(self) -> dict[str, Any]:
        """The engine and the model."""
        return {
            "engine": f"vllm {self._version}, offline, restarted for each repeat",
            "devices": {"kind": "GPU", "count": self._gpus},
            "model": {"name": self._model, "settings": self._engine},
        }

    def variants(self) -> list[dict[str, Any]]:
        """Each variant with its plan's digest."""
        found: list[dict[str, Any]] = []
        for name, path in self._plans.items():
            text = "" if path is None else json.dumps(Plan.load(path).to_json(), sort_keys=True)
            digest = hashlib.sha256(text.encode()).hexdigest()[:16]
            found.append({"name": name, "plan_sha256": digest if text else None})
        return found

    @contextmanager
    def at(self, load: ServiceLoad) -> Iterator[RunOne]:
        """The engine that runs; it is started by its variant's first run."""
        del load
        yield self._run_one

    def close(self) -> None:
        """Ends the engine that runs."""
        if self._running is not None:
            self._running.close()
            self._running = None

    def routing(self, load: ServiceLoad, run_one: RunOne) -> dict[str, Any]:
        """Not to be seen from outside the engine."""
        del load, run_one
        return {}

    def _run_one(
        self, name: str, load: ServiceLoad, requests: Sequence[Request], seed: str
    ) -> Outcome:
        del seed
        if self._running is None or self._running.name != name:
            self.close()
            self._running = _Engine(name, self._plans[name], self._engine)
        job = {
            "requests": [{"prompt": r.prompt, "output": r.output_tokens} for r in requests],
            "together": load.concurrency or len(requests),
            "max_seconds": self._settings.max_seconds,
        }
        answer = self._running.ask(job)
        return Outcome(
            [Timeline(a["sent"], tuple(a["tokens"]), a["input"], a["output"]) for a in answer]
        )


class _Engine:
    """A worker process with an engine in it."""

    def __init__(self, name: str, plan: Path | None, settings: Mapping[str, Any]) -> None:
        self.name = name
        environment = {k: v for k, v in os.environ.items() if k != PLAN}
        if plan is not None:
            environment[PLAN] = str(plan.resolve())
        self._log: IO[str] = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            WORKER,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
        )
        self.about = self.ask(settings)

    def ask(self, job: Any) -> Any:
        """Sends one line, waits for one."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            raise LeanMoeError(
                f"the vLLM engine of {self.name} ended with exit code {code}: {self._last_words()}"
            )
        return json.loads(line)

    def close(self) -> None:
        """Ends the process and waits until its memory is free."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(SECONDS_TO_LEAVE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = [line.strip() for line in self._log if line.strip()]
        errors = [line for line in lines if "Error" in line]
        return (errors or lines or ["it said nothing"])[-1][-300:]


def model_folder(model: str) -> str:
    """What vLLM calls the model."""
    if model == "reference":
        from leanmoe.models.reference import path

        return str(path())
    return model
