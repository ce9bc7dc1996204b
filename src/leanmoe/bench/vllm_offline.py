"""The load on vLLM's offline engine: one engine process at a time, restarted for each variant.

The process runs this file as a program. Whether a plan is at work is decided by LEANMOE_PLAN, which
vLLM's plugin reads when the process starts.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TextIO

from leanmoe.bench.measurement import Request, Timeline
from leanmoe.bench.prompts import Supply
from leanmoe.bench.settings import BenchSettings, ServiceLoad
from leanmoe.bench.sweep import Outcome, RunOne
from leanmoe.core.environment import PLAN
from leanmoe.core.errors import LeanMoeError
from leanmoe.core.installed_vllm import require_vllm
from leanmoe.models.reference import folder_of
from leanmoe.plan import Plan

FULL = "full"
SECONDS_TO_LEAVE = 30.0
WORKER = [sys.executable, "-m", "leanmoe.bench.vllm_offline"]


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
    ) -> None:
        """The settings' `engine_args` go before ours, and are stored with the results.

        Raises LeanMoeError where vLLM, or leanmoe's plugin in it, is not installed."""
        self._model, self._supply, self._settings = model, supply, settings
        self._plans: dict[str, Path | None] = {FULL: None, **plans}
        self._version = require_vllm(bool(plans)).version
        self._engine = {
            "model": folder_of(model),
            "tensor_parallel_size": settings.gpus or 1,
            "dtype": settings.dtype or "auto",
            "trust_remote_code": settings.trust_remote_code,
            "max_model_len": supply.longest,
            "max_num_seqs": max((load.concurrency or 1) for load in settings.loads()),
            **settings.engine_arguments(),
        }
        self._gpus = settings.gpus or 1
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
            "concurrency": load.concurrency or len(requests),
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


def serve_jobs() -> None:
    """The engine's process: reads jobs as JSON lines and answers with timelines.

    The first line says how to start the engine, each line after it is one closed loop, until
    standard input ends. Answers go to what was standard output; vLLM's own words go to standard
    error.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    engine, about = start_engine(json.loads(sys.stdin.readline()))
    _answer(answers, about)
    for line in sys.stdin:
        job = json.loads(line)
        loop = closed_loop(engine, job["requests"], job["concurrency"], job["max_seconds"])
        _answer(answers, loop)


def start_engine(settings: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The engine with prefix caching off, and what it is."""
    import vllm

    llm = vllm.LLM(**settings, enable_prefix_caching=False)
    return llm.llm_engine, {"vllm": vllm.__version__}


def closed_loop(
    engine: Any, requests: Sequence[Mapping[str, Any]], decode_batch: int, max_seconds: float
) -> list[dict[str, Any]]:
    """Keeps `decode_batch` requests under way until all are done; sends none after `max_seconds`.

    Each request has "prompt" (token ids) and "output" (tokens); each answer has "sent", "tokens"
    (when each came), "input" and "output". Decoding is greedy and never stops early.
    """
    start = time.perf_counter()
    sent: list[float] = []
    came: dict[str, list[float]] = {}
    finished: list[str] = []
    total = len(requests)
    while len(finished) < total:
        while len(sent) < total and len(sent) - len(finished) < decode_batch:
            if sent and time.perf_counter() - start > max_seconds:
                total = len(sent)
                break
            request, name = requests[len(sent)], str(len(sent))
            came[name] = []
            sent.append(time.perf_counter())
            prompt = {"prompt_token_ids": list(request["prompt"])}
            engine.add_request(name, prompt, sampling(int(request["output"])))
        for output in engine.step():
            now = time.perf_counter()
            tokens = output.outputs[0].token_ids if output.outputs else ()
            came[output.request_id] += [now] * len(tokens)
            if output.finished:
                finished.append(output.request_id)
    return [
        {
            "sent": sent[int(name)],
            "tokens": came[name],
            "input": len(requests[int(name)]["prompt"]),
            "output": len(came[name]),
        }
        for name in finished
    ]


def sampling(tokens: int) -> Any:
    """Greedy, so many tokens, each handed over as it comes."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        max_tokens=tokens,
        ignore_eos=True,
        temperature=0.0,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )


def _answer(stream: TextIO, value: Any) -> None:
    stream.write(json.dumps(value) + "\n")
    stream.flush()


if __name__ == "__main__":
    serve_jobs()
