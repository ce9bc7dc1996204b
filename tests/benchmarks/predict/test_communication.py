"""Collectives between two processes of a CPU, tiny."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.predict.communication import OPERATIONS, message_sizes

ROOT = Path(__file__).parents[3]


def test_sizes_rise_by_fours() -> None:
    assert message_sizes(20_000) == [1024, 4096, 16384]


def test_two_processes_measure_every_operation(tmp_path: Path) -> None:
    words = ["--device", "cpu", "--ranks", "2", "--largest", "1024", "--samples", "1"]
    command = [sys.executable, "-m", "benchmarks.predict.communication", *words]
    done = subprocess.run(
        [*command, "--output", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*-2x-*-communication.json")
    found = json.loads(path.read_text())
    assert set(found["seconds"]) == set(OPERATIONS)
    assert found["is_complete"]
    assert found["provenance"]["command"].startswith("python -m benchmarks.predict.communication")
