"""`leanmoe serve`: an OpenAI-compatible server of a model under a plan."""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path
from typing import Annotated

import typer

from leanmoe.core.errors import LeanMoeError
from leanmoe.core.installed_vllm import find_vllm, require_vllm
from leanmoe.models.shape import read_shape
from leanmoe.plan import Plan
from leanmoe.serve.plan_support import PROMPT, check_parts, without
from leanmoe.serve.vllm import launch

ENGINES = ("auto", "vllm", "transformers")


def serve(
    model: Annotated[str, typer.Argument(help="A folder, a hub name, or 'reference'.")],
    plan: Annotated[
        Path | None, typer.Option(help="A plan.json; without one the full model is served.")
    ] = None,
    engine_arguments: Annotated[
        list[str] | None, typer.Argument(help="Passed on to vLLM; put -- before them.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at.")] = 8000,
    engine: Annotated[
        str, typer.Option(help="vllm, transformers, or auto: vLLM where it is installed.")
    ] = "auto",
    drop: Annotated[
        list[str] | None,
        typer.Option(help="A part of the plan to leave out: prompt. May be repeated."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check, print the command, and stop.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what runs as JSON.")] = False,
) -> None:
    """Serve a model under a plan, or in full: /v1 as OpenAI has it, /metrics for Prometheus.

    Plan, model, port and engine are checked before weights are read.

    Example:
    leanmoe serve Qwen/Qwen3-30B-A3B --plan plan.json -- --max-model-len 8192
    """
    if engine not in ENGINES:
        raise LeanMoeError(f"--engine is {engine!r}: it must be one of {', '.join(ENGINES)}")
    if drop and plan is None:
        raise LeanMoeError(f"--drop {drop[0]} leaves out a part of a plan: give one with --plan")
    shape = read_shape(model).fingerprint()
    chosen = Plan(shape) if plan is None else without(Plan.load(plan), drop or [])
    chosen.check(shape)
    _check_port(host, port)
    if engine == "auto":
        engine = "transformers" if find_vllm() is None else "vllm"
    if engine == "vllm":
        check_parts(chosen, "vLLM", f"--drop {PROMPT}")
        _serve_vllm(model, plan, chosen, host, port, drop or [], engine_arguments or [],
                    dry_run, as_json)  # fmt: skip
        return
    if engine_arguments:
        raise LeanMoeError(
            f"{engine_arguments[0]} is an argument of vLLM's: Transformers' server takes none"
        )
    path = "" if plan is None else str(plan)
    _say({"engine": engine, "plan": path or "none", "model": model}, as_json)
    if dry_run:
        return
    from leanmoe.serve.transformers import serve as serve_transformers

    serve_transformers(launch.folder(model), model, chosen, path, host, port)


def _serve_vllm(
    model: str,
    path: Path | None,
    plan: Plan,
    host: str,
    port: int,
    drop: list[str],
    more: list[str],
    dry_run: bool,
    as_json: bool,
) -> None:
    """Becomes vLLM's server, so that signals and the exit code are its own."""
    install = require_vllm(with_plans=path is not None)
    variables = launch.environment(model, path, drop, install)
    command = launch.command(model, host, port, None if path is None else plan, more, install)
    _say({"engine": "vllm", "environment": variables, "command": command}, as_json)
    if not dry_run:
        sys.stdout.flush()
        os.execve(command[0], command, {**os.environ, **variables})


def _say(what: dict[str, object], as_json: bool) -> None:
    if as_json:
        print(json.dumps(what))
        return
    for name, value in what.items():
        shown = " ".join(value) if isinstance(value, list) else value
        if isinstance(value, dict):
            shown = " ".join(f"{key}={item}" for key, item in value.items())
        print(f"{name}: {shown}")


def _check_port(host: str, port: int) -> None:
    if not 0 < port < 65536:
        raise LeanMoeError(f"--port is {port}: it must be 1 to 65535")
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        reason = error.strerror or str(error)
        raise LeanMoeError(
            f"cannot listen at {host}:{port}: {reason}; choose another --port"
        ) from (error)
