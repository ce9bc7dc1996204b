"""`leanmoe serve`: an OpenAI-compatible server of a model under a plan."""

from __future__ import annotations

import os
import socket
import sys
from dataclasses import asdict
from typing import Annotated

import typer

from leanmoe.cli.options import AsJson, print_json
from leanmoe.core.errors import LeanMoeError
from leanmoe.core.installed_sglang import require_sglang
from leanmoe.core.installed_vllm import find_vllm, require_vllm
from leanmoe.models.reference import folder_of
from leanmoe.models.shape import read_shape
from leanmoe.plan import Plan
from leanmoe.serve.load_control import LoadControl, Slo
from leanmoe.serve.plugin_options import PROMPT, PluginOptions, check_parts
from leanmoe.serve.settings import ServeSettings
from leanmoe.serve.sglang import server_command
from leanmoe.serve.tiers import Tiers, tiers_of
from leanmoe.serve.vllm import launch


def serve(
    settings: ServeSettings,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print the command, and stop.")
    ] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Say what fits a plan in this vLLM, without a model.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Serve a model under a plan, or in full: /v1 as OpenAI has it, /metrics for Prometheus.

    Plan, model, port and engine are checked before weights are read. With --check no model is
    named: what the installed vLLM has of what plans need is printed, and anything that is needed
    and missing ends it with an error.

    Example:
    leanmoe serve Qwen/Qwen3-30B-A3B --plan plan.json -- --max-model-len 8192
    """
    if check:
        _say_what_fits(as_json)
        return
    if not settings.model:
        raise LeanMoeError("MODEL is missing: name a folder, a model on the Hub, or 'reference'")
    shape = read_shape(settings.model).fingerprint()
    tiers = _tiers(settings)
    plan = Plan(shape) if tiers is None else tiers.family
    plan.check(shape)
    _check_port(settings.host, settings.port)
    engine = settings.engine
    if engine == "auto":
        engine = "transformers" if find_vllm() is None else "vllm"
    if engine == "vllm":
        check_parts(plan, "vLLM", f"--drop {PROMPT}")
        _serve_vllm(settings, plan, dry_run, as_json)
        return
    if tiers is not None and tiers.are_open:
        raise LeanMoeError(
            f"{engine} serves one level of one plan: leave --tiers and --slo away, or use vLLM"
        )
    if engine == "sglang":
        check_parts(plan, "SGLang", f"--drop {PROMPT}")
        _serve_sglang(settings, dry_run, as_json)
        return
    if settings.engine_arguments:
        raise LeanMoeError(
            f"{settings.engine_arguments[0]} is an argument of vLLM's or SGLang's: Transformers' "
            "server takes none"
        )
    path = "" if settings.plan is None else str(settings.plan)
    _say({"engine": engine, "plan": path or "none", "model": settings.model}, as_json)
    if dry_run:
        return
    from leanmoe.serve.transformers import serve as serve_transformers

    folder = folder_of(settings.model)
    serve_transformers(folder, settings.model, plan, path, settings.host, settings.port)


def _tiers(settings: ServeSettings) -> Tiers | None:
    """What requests may ask for; None without a plan.

    Raises LeanMoeError where load control has nothing to choose from.
    """
    if settings.plan is None:
        return None
    options = PluginOptions(
        str(settings.plan), settings.drop, level=settings.level, tiers=settings.tiers,
        slo=settings.slo,
    )  # fmt: skip
    tiers = tiers_of(options)
    if settings.slo is not None:
        LoadControl(Slo.parse(settings.slo), len(tiers.faster))
    return tiers


def _serve_vllm(settings: ServeSettings, plan: Plan, dry_run: bool, as_json: bool) -> None:
    """Becomes vLLM's server, so that signals and the exit code are its own."""
    install = require_vllm(with_plans=settings.plan is not None)
    variables = launch.environment(
        settings.model,
        settings.plan,
        settings.drop,
        install,
        settings.level,
        settings.tiers,
        settings.slo,
    )
    command = launch.command(
        settings.model,
        settings.host,
        settings.port,
        None if settings.plan is None else plan,
        settings.engine_arguments,
        install,
    )
    _become("vllm", variables, command, dry_run, as_json)


def _serve_sglang(settings: ServeSettings, dry_run: bool, as_json: bool) -> None:
    """Becomes SGLang's server."""
    require_sglang(with_plans=settings.plan is not None)
    variables = server_command.environment(settings.plan, settings.drop, settings.level)
    command = server_command.command(
        settings.model, settings.host, settings.port, settings.engine_arguments
    )
    _become("sglang", variables, command, dry_run, as_json)


def _become(
    engine: str, variables: dict[str, str], command: list[str], dry_run: bool, as_json: bool
) -> None:
    _say({"engine": engine, "environment": variables, "command": command}, as_json)
    if not dry_run:
        sys.stdout.flush()
        os.execve(command[0], command, {**os.environ, **variables})


def _say_what_fits(as_json: bool) -> None:
    """What the installed vLLM has of what a plan needs or gains by."""
    from leanmoe.serve.vllm.installation import files_of_vllm
    from leanmoe.serve.vllm.survey import survey

    install = require_vllm(with_plans=False)
    findings = survey(install, files_of_vllm(), os.environ)
    missing = [each.says for each in findings if each.is_needed and not each.fits]
    if as_json:
        findings_json = [asdict(each) for each in findings]
        print_json({**asdict(install), "can_run_plans": not missing, "findings": findings_json})
    else:
        print(f"{install.distribution} {install.version}")
        for each in findings:
            print(f"{each.name}: {'fits' if each.fits else 'does not fit'}: {each.says}")
    if missing:
        raise LeanMoeError(missing[0])


def _say(what: dict[str, object], as_json: bool) -> None:
    if as_json:
        print_json(what)
        return
    for name, value in what.items():
        shown = " ".join(value) if isinstance(value, list) else value
        if isinstance(value, dict):
            shown = " ".join(f"{key}={item}" for key, item in value.items())
        print(f"{name}: {shown}")


def _check_port(host: str, port: int) -> None:
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        reason = error.strerror or str(error)
        raise LeanMoeError(
            f"cannot listen at {host}:{port}: {reason}; choose another --port"
        ) from error
