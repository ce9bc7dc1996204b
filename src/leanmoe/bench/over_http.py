"""The load over HTTP, through GuideLLM: servers alternate, each with its own plan or none."""

from __future__ import annotations

import asyncio
import math
import multiprocessing
import os
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib import import_module, metadata
from typing import Any
from urllib.parse import urlsplit

from leanmoe.bench.measurement import Request, Timeline
from leanmoe.bench.prompts import Supply
from leanmoe.bench.servers import MOST_OF_A_REASON, Server, answers, api_key
from leanmoe.bench.settings import BenchSettings, ServiceLoad
from leanmoe.bench.sweep import Outcome, RunOne
from leanmoe.core.errors import LeanMoeError, first_line

FAILED_SHARE = 0.1
"""A run ends early when more of its requests fail."""
CONNECT_SECONDS = 10.0
SECONDS_TO_END = 60.0
"""For GuideLLM's processes to start and to leave, beside the run's own time."""
PRELOADED = "leanmoe.bench.guidellm_client"
STREAMS_A_PROCESS = 64
"""Streams that one of GuideLLM's processes reads without falling behind."""
WATCHED_OUTPUT = 32
"""At most so many tokens of each reply while /metrics is read."""
WATCHED_ROUNDS = 3
"""Requests are then so many times those that are under way at once."""


class OverHTTP:
    """Runs loads against OpenAI-compatible servers."""

    restarts = False
    beside: frozenset[str] = frozenset()

    def __init__(
        self,
        servers: Sequence[Server],
        tokenizer: Any,
        settings: BenchSettings,
        supply: Supply,
    ) -> None:
        """`tokenizer` turns prompts into text."""
        self._servers = {server.name: server for server in servers}
        self._tokenizer, self._settings, self._gpus = tokenizer, settings, settings.gpus
        self._supply = supply
        self._version = prepare_guidellm()
        hosts = {urlsplit(server.url).hostname or "" for server in servers}
        bypass_proxies(hosts)

    def describe(self) -> dict[str, Any]:
        """The client; what runs in the servers is what they say of themselves."""
        return {
            "engine": f"HTTP, through GuideLLM {self._version}",
            "devices": {"kind": "GPU" if self._gpus else "server", "count": self._gpus or 1},
            "model": {"name": next(iter(self._servers.values())).model},
        }

    def variants(self) -> list[dict[str, Any]]:
        """Each server."""
        return [
            {"name": s.name, "url": s.url, "served_model": s.model, "root": s.root}
            for s in self._servers.values()
        ]

    @contextmanager
    def at(self, load: ServiceLoad) -> Iterator[RunOne]:
        """Nothing to set up: the servers run."""
        set_processes(load.concurrency or self._settings.max_concurrency)
        yield self._run_one

    def routing(self, load: ServiceLoad, run_one: RunOne) -> dict[str, Any]:
        """What each server shows at /metrics of steps without prompts, in a short load not timed.

        Where it shows nothing of that, "missing" says why.
        """
        from leanmoe.bench.server_routing import watch

        decode_batch = min(load.concurrency or self._settings.max_concurrency, load.requests)
        requests = [
            replace(each, output_tokens=min(each.output_tokens, WATCHED_OUTPUT))
            for each in self._supply.draw(load, "watched", WATCHED_ROUNDS * decode_batch)
        ]
        # A step of fewer rows than any prompt has decodes only, and so does one of a closed loop
        # whose rows are no more than its requests.
        most_rows = max(load.concurrency or 1, min(len(r.prompt) for r in requests) - 1)
        return {
            name: watch(server, partial(run_one, name, load, requests, "watched"), most_rows)
            for name, server in self._servers.items()
        }

    def close(self) -> None:
        """Nothing is left running."""

    def _run_one(
        self, name: str, load: ServiceLoad, requests: Sequence[Request], seed: str
    ) -> Outcome:
        server = self._servers[name]
        rows = [
            {
                "prompt": self._tokenizer.decode(list(request.prompt)),
                "prompt_tokens_count": len(request.prompt),
                "output_tokens_count": request.output_tokens,
            }
            for request in requests
        ]
        wanted = scenario(server, load, rows, self._settings, zlib.crc32(seed.encode()))
        outcome = run_scenario(wanted, server, self._settings.max_seconds + SECONDS_TO_END)
        if not outcome.timelines or (outcome.failed and not answers(server)):
            said = f": {outcome.reason}" if outcome.reason else ""
            what = "refuses the load" if said and answers(server) else "stopped answering"
            raise LeanMoeError(
                f"{server.url} ({name}) {what} at {load.name}: {len(outcome.timelines)} requests "
                f"were completed and {outcome.failed} failed{said}"
            )
        return outcome


def prepare_guidellm() -> str:
    """Imports GuideLLM set up for short runs; its version. Raises LeanMoeError where it is absent.

    Each run of GuideLLM starts processes of its own. Started afresh they take 10 seconds (2 cores);
    forked from a server that has imported it, 2.
    """
    os.environ.setdefault("GUIDELLM__MP_CONTEXT_TYPE", "forkserver")
    try:
        version = metadata.version("guidellm")
        import_module(PRELOADED)  # registers our backend
    except ImportError as error:
        raise LeanMoeError(
            "GuideLLM is not installed, and it sends the load: pip install 'leanmoe[bench]'"
        ) from error
    multiprocessing.set_forkserver_preload([PRELOADED])
    import_module("loguru").logger.disable("guidellm")  # its remarks; failures are raised
    return version


def bypass_proxies(hosts: set[str]) -> None:
    """Requests go to the servers themselves: a proxy would be measured with them."""
    for name in ("NO_PROXY", "no_proxy"):
        known = {host for host in os.environ.get(name, "").split(",") if host}
        os.environ[name] = ",".join(sorted(known | hosts))


def set_processes(decode_batch: int) -> None:
    """Lets GuideLLM have as many processes as the streams need, on the cores there are."""
    from guidellm.settings import settings

    cores = os.cpu_count() or 1
    settings.max_worker_processes = max(1, min(cores, math.ceil(decode_batch / STREAMS_A_PROCESS)))


def scenario(
    server: Server,
    load: ServiceLoad,
    rows: Sequence[Mapping[str, Any]],
    settings: BenchSettings,
    seed: int,
) -> Any:
    """One run, as GuideLLM describes it."""
    from guidellm.schemas.benchmark import BenchmarkArgs, BenchmarkScenario

    from leanmoe.bench.guidellm_client import KIND

    if load.rate is None:
        profile: dict[str, Any] = {"kind": "concurrent", "streams": [load.concurrency]}
    else:
        profile = {
            "kind": "poisson",
            "rate": [load.rate],
            "max_concurrency": settings.max_concurrency,
        }
    spec = BenchmarkArgs(
        backend={
            "kind": KIND,
            "target": server.url,
            "model": server.model,
            "api_key": api_key(),
            "http2": False,
            "validate_backend": False,
            "follow_redirects": False,
            "timeout": settings.max_seconds,
            "timeout_connect": CONNECT_SECONDS,
            "extras": {"body": {"temperature": 0.0}},
        },
        profile=profile,
        data=[{"kind": "in_memory_dict_list", "data": [dict(row) for row in rows]}],
        constraints=[
            {"kind": "max_requests", "count": len(rows)},
            {"kind": "max_duration", "seconds": settings.max_seconds},
            {"kind": "max_errors", "count": max(2, math.ceil(FAILED_SHARE * len(rows)))},
        ],
        outputs=[],
        seed={"kind": "static", "value": seed},
    )
    return BenchmarkScenario(spec=spec)


def run_scenario(wanted: Any, server: Server, most_seconds: float) -> Outcome:
    """Runs it to its end. Raises LeanMoeError when GuideLLM itself fails or does not end."""
    from guidellm.benchmark.entrypoints import benchmark_generative_text

    async def bounded() -> Any:
        running = benchmark_generative_text(wanted, progress=False, console=None)
        return await asyncio.wait_for(running, most_seconds)

    try:
        report, _ = asyncio.run(bounded())
    except TimeoutError as error:
        raise LeanMoeError(
            f"the load on {server.url} did not end within {most_seconds:.0f} seconds"
        ) from error
    except (RuntimeError, ValueError, OSError, EOFError) as error:
        raise LeanMoeError(f"the load on {server.url} failed: {first_line(error)}") from error
    requests = report.benchmarks[0].requests
    return Outcome(
        [timeline for each in requests.successful if (timeline := timeline_of(each))],
        len(requests.errored),
        next((_reason(each.info.error) for each in requests.errored if each.info.error), None),
    )


def _reason(error: str) -> str:
    """The words of an error that GuideLLM keeps as Python shows it: `ValueError('HTTP 400: ...')`.

    GuideLLM's own words before an error of the stream are left out.
    """
    match = re.fullmatch(r"\w+\((['\"])(.*)\1,?\)", error, re.DOTALL)
    words = (match[2] if match else error).removeprefix("Streaming response returned an error: ")
    return " ".join((words.strip() or error).split())[:MOST_OF_A_REASON]


def timeline_of(stats: Any) -> Timeline | None:
    """Our timeline of a request that GuideLLM saw through; None where no token came."""
    from leanmoe.bench.guidellm_client import ARRIVALS, ASKED, COUNTED

    noted = stats.response_metrics or {}
    arrivals = noted.get(ARRIVALS) or []
    timings = stats.info.timings
    if not arrivals or timings.request_start is None:
        return None
    due = timings.targeted_start
    return Timeline(
        timings.request_start,
        tuple(arrivals),
        stats.prompt_tokens or 0,
        # Without a usage GuideLLM takes what was asked for to be what came: pieces are counted.
        noted.get(COUNTED) or len(arrivals),
        0.0 if due is None else max(0.0, timings.request_start - due),
        noted.get(ASKED),
    )
