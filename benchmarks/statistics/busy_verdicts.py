"""Whether other work on the machine changes tune's verdicts: runs beside a busy process, and quiet.

A first quiet run measures everything. The others take its losses, which no machine changes, and
measure times anew: of layers and of whole loads. Quiet and busy runs take turns. A busy one has a
process beside it that never waits, as `make demo` on two cores beside other work.

Two runs agree at a load when both accept, or neither does; their plans, when the rules at work are
the same. Where layer times choose another plan, its losses are measured and kept for later runs.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common.results import collect, file_of, parser_of, write
from leanmoe.core.provenance import Provenance
from leanmoe.results.tune import TuneResults
from leanmoe.tune.context import GAIN, LAYER_TIMES, digest

MAKEFILE = Path(__file__).parents[2] / "Makefile"
TIMED = tuple(f"{stage.name}-" for stage in (GAIN, LAYER_TIMES))
MADE_LAST = {"results.json", "plan.json", "report.html"}
LEANMOE = "import sys; from leanmoe.cli import main; sys.exit(main())"
SPIN = "while True: pass"


@dataclass(frozen=True)
class Verdicts:
    """What one run said."""

    is_busy: bool
    seconds: float
    """Of the whole process; stored losses are not measured again."""
    accepted: Mapping[int, bool]
    """By concurrency."""
    plans: Mapping[int, str]
    """A digest of the rules chosen there, those for prompts among them; "" without a plan."""
    gains: Mapping[int, tuple[float, float]]
    """The interval of the throughput's ratio."""

    @classmethod
    def of(cls, results: TuneResults, is_busy: bool, seconds: float) -> Verdicts:
        """Reads them from a run's results."""
        chosen = {f.concurrency: [p for p in f.points if p.chosen] for f in results.fronts}
        return cls(
            is_busy,
            seconds,
            {each.concurrency: each.accepted for each in results.verdicts},
            {n: digest([*p[0].prompt, *p[0].rules]) if p else "" for n, p in chosen.items()},
            {e.concurrency: (e.gain.low, e.gain.high) for e in results.verdicts if e.gain},
        )

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {**vars(self), "gains": {load: list(ends) for load, ends in self.gains.items()}}


def agreement(first: Verdicts, others: Sequence[Verdicts]) -> dict[str, Any]:
    """How many of the runs say what the first says: at every load, by load, and with its plans."""
    same = [run for run in others if run.accepted == first.accepted]
    return {
        "runs": len(others),
        "verdicts": len(same),
        "verdicts_and_plans": sum(run.plans == first.plans for run in same),
        "verdicts_by_load": {
            load: sum(run.accepted[load] == accepted for run in others)
            for load, accepted in first.accepted.items()
        },
    }


def demo_options() -> list[str]:
    """What `make demo` asks of tune, but for the folder."""
    joined = MAKEFILE.read_text(encoding="utf-8").replace("\\\n", " ")
    found = re.search(r"leanmoe tune (\S+) --output \S+ --overwrite (.*)", joined)
    if found is None:
        raise SystemExit(f"{MAKEFILE} has no demo that runs leanmoe tune")
    return [found[1], *shlex.split(found[2])]


def copy_losses(source: Path, target: Path) -> None:
    """Every stored step that holds no time, and the profile."""
    target.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.is_file() and not file.name.startswith(TIMED) and file.name not in MADE_LAST:
            shutil.copy2(file, target / file.name)


@contextmanager
def beside(is_busy: bool) -> Iterator[subprocess.Popen[bytes] | None]:
    """A process that takes a core, where the machine is to be busy."""
    if not is_busy:
        yield None
        return
    process = subprocess.Popen([sys.executable, "-c", SPIN])
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def one_run(folder: Path, options: Sequence[str], is_busy: bool) -> Verdicts:
    """Runs tune in a process of its own; SystemExit where it fails."""
    command = [sys.executable, "-c", LEANMOE, "tune", *options, "--output", str(folder)]
    with beside(is_busy):
        started = time.monotonic()
        code = subprocess.run(command, check=False).returncode
        seconds = time.monotonic() - started
    if code:
        raise SystemExit(f"tune ended with {code} in {folder}")
    return Verdicts.of(TuneResults.load(folder / "results.json"), is_busy, seconds)


def main() -> None:
    """Runs all, prints who agrees, and writes the results file after every run."""
    parser = parser_of(__doc__)
    parser.add_argument("--runs", type=int, default=10, help="busy ones, and quiet ones")
    parser.add_argument("--folder", type=Path, default=Path("runs/verdicts"), help="of all runs")
    parser.add_argument("--tune", type=shlex.split, help="options of tune; else those of the demo")
    asked = parser.parse_args()
    options = asked.tune or demo_options()
    if asked.folder.exists():
        raise SystemExit(f"{asked.folder} exists: give another folder, or remove it")
    made, store = collect(0), asked.folder / "losses"
    first = one_run(asked.folder / "first", options, is_busy=False)
    copy_losses(asked.folder / "first", store)
    runs: list[Verdicts] = []
    for number in range(2 * asked.runs):
        is_busy = number % 2 == 0
        folder = asked.folder / f"{'busy' if is_busy else 'quiet'}-{number // 2}"
        copy_losses(store, folder)
        runs.append(one_run(folder, options, is_busy))
        copy_losses(folder, store)
        path = _write(asked.output, made, options, first, runs)
    print(path)


def _write(
    output: Path,
    made: Provenance,
    options: Sequence[str],
    first: Verdicts,
    runs: Sequence[Verdicts],
) -> Path:
    said = {
        name: agreement(first, [run for run in runs if run.is_busy is is_busy])
        for name, is_busy in (("busy", True), ("quiet", False))
    }
    for name, found in said.items():
        print(f"{name}: {found['verdicts']} of {found['runs']} runs say what the first said")
    content = {
        "options": list(options),
        "agreement": said,
        "first": first.to_json(),
        "runs": [run.to_json() for run in runs],
    }
    return write(file_of(output, "busy-verdicts", made), made, "measured", content)


if __name__ == "__main__":
    main()
