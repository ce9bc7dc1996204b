"""What a process needs at most to load a checkpoint and to run steps of it. Used by pruning.py.

A process of its own for each: what an earlier model left behind would count otherwise. The peak is
that of the resident set (VmHWM), the lower of two runs, since the first may compile kernels; beside
it stands what Python, torch and Transformers need before anything is loaded.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.pruning.speed import Variant, steps_of, take_step
from leanmoe.plan import Plan
from leanmoe.runtime import load_model, shape_of

STEADY = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
"""So that what is freed goes back to the system: the peak then varies by under 1%."""
RUNS = 2


def main() -> None:
    """Folder of the checkpoint, file of the plan ('' for none), file of the prompts' ids."""
    folder, plan_file, ids_file = sys.argv[1:]
    before = peak_bytes()
    model, _ = load_model(folder)
    plan = Plan.load(Path(plan_file)) if plan_file else Plan(shape_of(model).fingerprint())
    variant = Variant(("", ""), model, plan)
    ids_SN = torch.tensor(json.loads(Path(ids_file).read_text()))
    for ids, cache in steps_of(variant, ids_SN).values():
        take_step(variant, ids, cache)
    print(json.dumps({"peak_bytes": peak_bytes(), "before_loading_bytes": before}))


def peak_bytes() -> int:
    """Of this process's resident set."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise RuntimeError("this system does not say a process's peak memory in /proc/self/status")
    return 1024 * int(found[1])


def peak_of(folder: Path, plan_file: Path | None, ids_file: Path) -> dict[str, int]:
    """Runs this file in processes of its own."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.pruning.memory",
        str(folder),
        str(plan_file or ""),
        str(ids_file),
    ]
    found: list[dict[str, int]] = []
    for _ in range(RUNS):
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env=os.environ | STEADY
        )
        if done.returncode:
            raise RuntimeError(f"{folder} could not be run: {done.stderr.strip()[-500:]}")
        found.append(json.loads(done.stdout.splitlines()[-1]))
    return min(found, key=lambda each: each["peak_bytes"])


if __name__ == "__main__":
    main()
