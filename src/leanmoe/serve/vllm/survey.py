"""`leanmoe serve --check`: what fits a plan in this installation of vLLM, without a model.

vLLM's files are read and nothing of it is run, so a GPU is not asked; what only a loaded model can
tell (its backend, its layers, whether skipped slots have no row) the log says at load.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from leanmoe.core.errors import LeanMoeError
from leanmoe.core.installed_vllm import VllmInstall, check_plugin, check_version
from leanmoe.serve.plugin_options import PluginOptions
from leanmoe.serve.vllm.installation import (
    ABSENT,
    EXPERTS,
    OPTIONAL,
    Read,
    check_hooks,
    known_signatures,
    read_signatures,
    skips_padding_by_default,
    symbols_of,
)
from leanmoe.serve.vllm.launch import entry_point

SUM = "_custom_ops:moe_sum"
"""vLLM's sum of a token's rows, which can leave skipped ones out since this version."""
SUM_SINCE = "0.26.0"


@dataclass(frozen=True)
class Finding:
    """One thing that a plan needs of an installation, or gains by."""

    name: str
    fits: bool
    says: str
    """What is the case, and for what does not fit what to do."""
    is_needed: bool = False
    """Whether no plan can run without it."""


def survey(install: VllmInstall, read: Read, environ: Mapping[str, str]) -> list[Finding]:
    """What an installed vLLM has of what a plan needs or gains by.

    `read` gives the text of its files, `environ` holds the variables that it would be started with.
    """
    number = install.version.partition("+")[0]
    found = read_signatures(read, symbols_of(EXPERTS, OPTIONAL))
    has = {symbol.rpartition(".")[2] for symbol, one in found.items() if one != ABSENT}
    return [
        _needed("version", lambda: _version(number, read)),
        _needed("plugin", _plugin),
        _needed("variables", lambda: _variables(environ)),
        Finding("command", True, f"python -m {entry_point(install)[0]}"),
        Finding("padding, V1 runner", True, _padding("_prepare_padding_mask" in has)),
        _padding_of_v2(number, environ),
        _skipped_slots(found[SUM] == known_signatures()[SUM_SINCE][SUM]),
        _backends("supports_monolithic_kernels" in has),
    ]


def _needed(name: str, ask: Callable[[], str]) -> Finding:
    """What `ask` says; where it refuses, no plan can run."""
    try:
        return Finding(name, True, ask(), is_needed=True)
    except LeanMoeError as error:
        return Finding(name, False, str(error), is_needed=True)


def _version(number: str, read: Read) -> str:
    check_version(number)
    return check_hooks(number, read)


def _plugin() -> str:
    check_plugin()
    return "vLLM finds leanmoe's by its entry point"


def _variables(environ: Mapping[str, str]) -> str:
    options = PluginOptions.from_environ("vLLM", environ)
    return "no LEANMOE_PLAN is set" if options is None else f"LEANMOE_PLAN is {options.path}"


def _padding(is_marked: bool) -> str:
    return "vLLM marks it" if is_marked else "it is read from the slots of the KV cache"


def _padding_of_v2(number: str, environ: Mapping[str, str]) -> Finding:
    name, by_default = "padding, V2 runner", skips_padding_by_default(number)
    is_marked = environ.get("VLLM_MOE_SKIP_PADDING", "1" if by_default else "0") != "0"
    if is_marked or not by_default:
        return Finding(name, True, _padding(is_marked))
    says = "batch-aware rules cannot run with VLLM_MOE_SKIP_PADDING=0: unset it"
    return Finding(name, False, says)


def _skipped_slots(sum_leaves_out: bool) -> Finding:
    if sum_leaves_out:
        says = "vLLM's Triton experts can compute no row for them: tried when a model is loaded"
    else:
        says = (
            f"vLLM's kernels compute a row for each in large steps: install {SUM_SINCE} or newer, "
            "or set LEANMOE_EXPERTS=leanmoe"
        )
    return Finding("skipped slots", sum_leaves_out, says)


def _backends(can_be_asked: bool) -> Finding:
    says = "vLLM is asked for kernels that leave the choice of experts to its router"
    if not can_be_asked:
        says = "vLLM may pick kernels that choose experts themselves: then set --moe-backend triton"
    return Finding("backends", can_be_asked, says)
