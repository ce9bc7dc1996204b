"""How far is the cost model from vLLM's steps on several GPUs, and from what plans gain there?

    python -m benchmarks.predict.several_gpus
    python -m benchmarks.predict.several_gpus --communication A-communication.json

Reads results of `vllm.several_gpus`, by default all in results/, and shows for every layout, load
and plan the captured step and its gain over stock vLLM, measured and predicted from the experts
that the run itself counted, those of the most loaded GPU among them. Nothing is fitted to these
runs. With `--communication` collectives are those that `communication.py` measured between such
GPUs. `compare` writes the same figures beside its others.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common.results import RESULTS
from benchmarks.predict.collective_rates import with_collectives
from benchmarks.predict.engine_runs import FULL, gpu_of, read_layouts
from leanmoe.core.errors import LeanMoeError
from leanmoe.core.files import read_json
from leanmoe.predict.constants import Constants, shipped
from leanmoe.predict.hardware.gpus import GPUS

STOCK = FULL[0]


def parallel_steps(path: Path, constants: Constants) -> Iterator[dict[str, Any]]:
    """Every line of a results file in every layout, with what is predicted."""
    for layout, run in read_layouts(path, constants).items():
        stock = {
            (line["routing"], line["requests"]): (line["step_ms"]["median"], run.captured(line))
            for line in run.lines
            if line["plan"] == STOCK
        }
        for line in run.lines:
            measured, predicted = line["step_ms"]["median"], run.captured(line)
            full = stock.get((line["routing"], line["requests"]))
            gains = None if full is None else (full[0] / measured, full[1] / predicted)
            yield {
                "file": path.name,
                "layout": layout,
                "what": f"{run.model.name}, {run.model.layers} layers",
                "plan": line["plan"],
                "concurrency": line["requests"],
                "most_loaded": line["most_loaded"],
                "measured_ms": measured,
                "predicted_ms": round(1e3 * predicted, 3),
                "error": float(f"{1e3 * predicted / measured - 1:.4g}"),
                "measured_gain": gains and round(gains[0], 3),
                "predicted_gain": gains and round(gains[1], 3),
                "gain_error": gains and float(f"{gains[1] / gains[0] - 1:.4g}"),
            }


def summary(rows: Sequence[dict[str, Any]]) -> list[str]:
    """For every file and layout: mean and worst error of steps, and of what plans gain."""
    found = []
    for file, layout in dict.fromkeys((row["file"], row["layout"]) for row in rows):
        mine = [row for row in rows if (row["file"], row["layout"]) == (file, layout)]
        plans = [row for row in mine if row["plan"] not in FULL]
        cells = {
            "full model": [row["error"] for row in mine if row["plan"] in FULL],
            "plans": [row["error"] for row in plans],
            "gains": [row["gain_error"] for row in plans if row["gain_error"] is not None],
        }
        words = [
            f"{name} {np.abs(errors).mean():.1%}, worst {np.abs(errors).max():.1%} of {len(errors)}"
            for name, errors in cells.items()
            if errors
        ]
        found.append(f"{mine[0]['what']}, {layout}: {'; '.join(words)}  ({file})")
    return found


def show(rows: Sequence[dict[str, Any]]) -> None:
    """A line for each point, then the summary."""
    for row in rows:
        gains = ""
        if row["gain_error"] is not None:
            gains = (
                f"   gain {row['measured_gain']:.2f}x {row['predicted_gain']:.2f}x "
                f"{row['gain_error']:+6.1%}"
            )
        print(
            f"{row['what']:28s} {row['layout']:7s} {row['plan']:20s} {row['concurrency']:4d} "
            f"{row['measured_ms']:7.2f} ms {row['predicted_ms']:7.2f} {row['error']:+6.1%}{gains}"
        )
    print(*summary(rows), sep="\n")


def main() -> None:
    """Prints every point and the errors of each layout."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("files", type=Path, nargs="*")
    parser.add_argument("--communication", type=Path)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    try:
        for path in arguments.files or sorted(RESULTS.glob("*-parallel-*.json")):
            hardware = read_json(path, "results")["provenance"]["hardware"]
            constants = shipped()
            if arguments.communication is not None:
                gpu = GPUS[gpu_of(hardware)]
                constants = with_collectives(constants, arguments.communication, gpu)
            rows += parallel_steps(path, constants)
    except LeanMoeError as error:
        sys.exit(str(error))
    show(rows)


if __name__ == "__main__":
    main()
