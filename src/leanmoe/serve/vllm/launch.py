"""The command that serves a model with a plan in vLLM, checked before it is run; needs no torch."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from leanmoe.core.environment import DROP, LEVEL, PLAN, SLO, STATISTICS, TIERS
from leanmoe.core.installed_vllm import VllmInstall
from leanmoe.models.hf_config import read_config
from leanmoe.models.reference import folder_of
from leanmoe.plan import Plan
from leanmoe.serve.plugin_options import plan_paths

MLA_WIDTHS = (320, 576)
"""Widths of a latent head with its rotary part that vLLM's MLA kernels take."""


def environment(
    model: str,
    plan: Path | None,
    drop: Sequence[str],
    install: VllmInstall,
    level: str | None = None,
    tiers: bool = False,
    slo: str | None = None,
) -> dict[str, str]:
    """Variables that the server needs besides those it is given; without a plan it is stock."""
    variables = {}
    if plan is not None:
        whole = (str(path.resolve()) for path in plan_paths(str(plan)))
        variables = {PLAN: ",".join(whole), STATISTICS: "1"}
    if tiers:
        variables[TIERS] = "1"
    if slo is not None:
        variables[SLO] = slo
    if level is not None:
        variables[LEVEL] = level
    if drop:
        variables[DROP] = ",".join(drop)
    if install.is_for_cpus and "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
        variables["VLLM_CPU_KVCACHE_SPACE"] = "1"
    if lacks_mla_kernel(read_config(model), install):
        variables["VLLM_MLA_DISABLE"] = "1"
    return variables


def command(
    model: str, host: str, port: int, plan: Plan | None, more: Sequence[str], install: VllmInstall
) -> list[str]:
    """The server's command line; what the user adds comes last and so prevails."""
    config = read_config(model)
    name = folder_of(model)
    words = [sys.executable, "-m", *entry_point(install), name]
    words += ["--served-model-name", model, "--host", host, "--port", str(port)]
    if plan is not None:
        words += ["--worker-extension-cls", "leanmoe.serve.vllm.plan_metrics.PlanWorker"]
        words += ["--middleware", "leanmoe.serve.vllm.plan_metrics.PlanMetrics"]
        words += ["--middleware", "leanmoe.serve.vllm.plan_switch.PlanSwitch"]
    if overrides := missing_in(config):
        words += ["--hf-overrides", json.dumps(overrides)]
    settings = compilation(plan, lacks_mla_kernel(config, install))
    if "--compilation-config" not in more and settings:
        words += ["--compilation-config", json.dumps(settings)]
    return [*words, *more]


def entry_point(install: VllmInstall) -> list[str]:
    """What starts vLLM's server, up to the model: `vllm serve`, the other way is deprecated.

    Its command line asks for the version of a distribution `vllm` and ends where there is none
    (`entrypoints/cli/main.py:99`, 0.32.0): vllm-cpu is one of that kind.
    """
    if install.distribution == "vllm" and install.version:
        return ["vllm.entrypoints.cli.main", "serve"]
    return ["vllm.entrypoints.openai.api_server", "--model"]


def lacks_mla_kernel(config: Mapping[str, Any], install: VllmInstall) -> bool:
    """Whether vLLM on a CPU must do without MLA, since its kernels take no heads of this width."""
    latent, rotary = config.get("kv_lora_rank"), config.get("qk_rope_head_dim")
    if not isinstance(latent, int) or not isinstance(rotary, int):
        return False
    return install.is_for_cpus and latent + rotary not in MLA_WIDTHS


def compilation(plan: Plan | None, has_no_mla: bool) -> dict[str, Any]:
    """Settings of vLLM's compilation that a plan wants: its bands' ends as capture sizes."""
    # vllm-cpu's own operators get DeepSeek's rotary positions wrong where MLA is off.
    settings: dict[str, Any] = {"custom_ops": ["none"]} if has_no_mla else {}
    if plan is not None and (sizes := capture_sizes(plan)):
        settings["cudagraph_capture_sizes"] = sizes
    return settings


def capture_sizes(plan: Plan) -> list[int]:
    """vLLM's default sizes and the ends of the bands; nothing where those are among them."""
    usual = [1, 2, 4, *range(8, 256, 8), *range(256, 513, 16)]
    bands = [band for level in plan.levels for band in level.bands]
    ends = {band.up_to for band in bands if band.up_to is not None and band.up_to <= usual[-1]}
    return sorted({*usual, *ends}) if ends - set(usual) else []


def missing_in(config: Mapping[str, Any]) -> dict[str, str]:
    """What vLLM wants in a DeepSeek-V3 config that newer versions of Transformers leave out."""
    if config.get("model_type") != "deepseek_v3":
        return {}
    wanted = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
    return {name: value for name, value in wanted.items() if name not in config}
