"""How far is the cost model from what was measured: layers of ours, and whole steps of vLLM?

    python -m benchmarks.predict.compare

Reads each committed results/*-experts-gpu.json (one layer by tokens and rule; `kernels.experts_gpu`
writes them; leanmoe's constants of that GPU are fitted to its rows of the full model, which count
as fitted), every results/*-vllm-*.json (decode steps under plans; `vllm.one_gpu` writes them) and
every list in data/readings/: a model, a machine, and rows of concurrency, k, rule, distinct experts
(or null), microseconds that the rule itself took a layer, and milliseconds a step. A layer's and an
engine's own times are fitted to every second load of the full model in one run (`engine_runs`),
which count as fitted; nothing else is. Steps on several GPUs are those of `several_gpus`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common.results import RESULTS, collect, file_of, parser_of, write
from benchmarks.predict.engine_runs import FULL, gpu_of, read_run, runs_in
from benchmarks.predict.several_gpus import parallel_steps, summary
from leanmoe.core.files import read_json
from leanmoe.models.catalog import published_shape
from leanmoe.plan import Plan, Rule
from leanmoe.predict.constants import shipped
from leanmoe.predict.experts.assumed import Assumed
from leanmoe.predict.experts.curve_sources import assumed_curves
from leanmoe.predict.experts.curves import Activation, CurveOf, from_points
from leanmoe.predict.hardware.gpus import GPUS
from leanmoe.predict.kernels.features import ExpertsShape, Rows
from leanmoe.predict.kernels.small_steps import SLOT_BY_SLOT, SmallSteps, slot_by_slot
from leanmoe.predict.kernels.tables import WEIGHT_BYTES
from leanmoe.predict.step.deployment import Deployment
from leanmoe.predict.step.step_time import StepBatch, StepTime

KERNELS = {
    ("leanmoe", "bfloat16"): ("leanmoe", "bfloat16"),
    ("leanmoe", "float8_e4m3fn"): ("leanmoe", "fp8_block"),
    ("vLLM", "bfloat16"): ("vllm-triton", "bfloat16"),
    ("vLLM", "float8_e4m3fn"): ("vllm-triton", "fp8_block"),
}
"""Implementation and dtype in a results file: kernel and format of our constants."""
READINGS = Path(__file__).parent / "data/readings"
LAYER_LIMIT, STEP_LIMIT = 0.04, 0.10
"""What the model is held to: of a layer of ours, of a whole step."""


def layers(path: Path) -> Iterator[dict[str, Any]]:
    """Each measured layer of a results file with what is predicted."""
    found = read_json(path, "results")
    gpu = GPUS[gpu_of(found["provenance"]["hardware"])]
    for line in [*found["lines"], *found["rules"]]:
        experts, hidden, rest = line["shape"].split(" x ")
        width, dtype = rest.split(" ")
        for name, took in line["microseconds"].items():
            known = KERNELS.get((name, dtype))
            if known is None:
                continue
            constants, origin = shipped().find(known[0], gpu.name, known[1])
            shape = ExpertsShape(
                int(hidden),
                int(width),
                int(experts),
                weight_bytes=WEIGHT_BYTES[known[1]],
                activation_bytes=1.0 if "fp8" in known[1] else 2.0,
            )
            tokens = line["tokens"]
            rows = Rows(tokens, line["rows"] / tokens, line["rows"], line["distinct"])
            if line["rows"] <= SLOT_BY_SLOT.get(known, 0.0) * shape.experts:
                rows = slot_by_slot(shape, rows, line["rows"], gpu)
            seconds = constants.seconds(shape, rows, gpu)
            yield {
                "file": path.name,
                "what": f"{name}, {line['shape']}, {line['rule']}",
                "gpu": gpu.name,
                "tokens": tokens,
                "measured_us": took,
                "predicted_us": round(1e6 * seconds, 1),
                "error": float(f"{1e6 * seconds / took - 1:.4g}"),
                "fitted": name == "leanmoe" and line["rule"] == "k=8",
                "stands_on": origin,
            }


def steps(path: Path) -> Iterator[dict[str, Any]]:
    """Each measured step of a list with what is predicted."""
    found = read_json(path, "readings")
    if not {"model", "hardware", "kernel", "context", "rows"} <= set(found):
        print(f"{path} is no list of steps: left out", file=sys.stderr)
        return
    model = published_shape(found["model"])  # the trial timed the captured model alone
    place = Deployment(GPUS[found["hardware"]], found.get("tensor", 1))
    step = StepTime(model, place, shipped(), found["kernel"], SmallSteps.REPEAT)  # before plugins
    for row in found["rows"]:
        rule = Rule(top_k=row["k"] if row["k"] != model.top_k else None, **row["rule"])
        plan = None if rule.is_empty else Plan.uniform(model.fingerprint(), rule)
        curves = assumed_curves(model, Assumed())
        if row["distinct"] is not None:
            curves = _measured_curve(row, model.experts)
        batch = StepBatch(row["concurrency"], found["context"])
        parts = step.parts(batch, Activation(model, plan, curves))
        seconds = parts.total - parts.head - parts.engine
        seconds += len(model.moe_layers) * row["layer_us"] * 1e-6
        yield {
            "file": path.name,
            "what": f"{found['model']}, {rule.to_json() or 'full model'}",
            "concurrency": row["concurrency"],
            "measured_ms": row["step_ms"],
            "predicted_ms": round(1e3 * seconds, 2),
            "error": float(f"{1e3 * seconds / row['step_ms'] - 1:.4g}"),
            "fitted": False,
        }


def engine_steps(path: Path) -> Iterator[dict[str, Any]]:
    """Each decode step of `vllm.one_gpu` with what is predicted from the experts that it activated.

    The run says how many distinct experts and slots each plan had, so nothing of routing is
    assumed; what a plan's routing itself takes is not modelled. A captured step is the model up to
    its last hidden states, without head and engine; the time of a token has both.
    """
    run = read_run(path, shipped())
    for line in run.lines:
        parts = run.parts(line)
        captured = run.captured(line)
        for what, measured, seconds in (
            ("step", line["step_ms"]["median"], captured),
            ("TPOT", line["tpot_ms"]["median"], parts.total),
        ):
            yield {
                "file": path.name,
                "of": what,
                "what": f"{run.model.name}, {line['routing']}, {line['plan']}",
                "gpu": run.gpu.name,
                "plan": line["plan"],
                "experts": run.experts(line),
                "concurrency": line["requests"],
                "distinct": line["distinct"],
                "measured_ms": measured,
                "predicted_ms": round(1e3 * seconds, 3),
                "error": float(f"{1e3 * seconds / measured - 1:.4g}"),
                "fitted": run.is_fitted(line),
            }


def _measured_curve(row: dict[str, Any], experts: int) -> CurveOf:
    slots = row.get("slots") or row["k"]
    point = (float(row["concurrency"]), float(row["distinct"]), float(slots))
    curve = from_points([point], experts, "measured in the run")
    return lambda _layer, _rule: curve


def _by_plan(rows: list[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    return [
        (f"{whose} experts, {kind}", [r for r in found if not r["fitted"]])
        for whose in sorted({r["experts"] for r in rows}, reverse=True)
        for kind, found in (
            ("full model", [r for r in rows if r["experts"] == whose and r["plan"] in FULL]),
            ("plans", [r for r in rows if r["experts"] == whose and r["plan"] not in FULL]),
        )
    ]


def main() -> None:
    """Compares, writes JSON, prints tables."""
    parser = parser_of(__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of what was measured")
    parser.add_argument("--readings", type=Path, default=READINGS, help="folder of lists of steps")
    arguments = parser.parse_args()
    results: Path = arguments.results
    found_layers = [r for p in sorted(results.glob("*-experts-gpu.json")) for r in layers(p)]
    lists = sorted(arguments.readings.glob("*.json"))
    found_steps = [row for path in lists for row in steps(path)]
    runs = runs_in(results)
    found_engine = [row for path in runs for row in engine_steps(path)]
    layouts = sorted(results.glob("*-parallel-*.json"))
    found_parallel = [row for path in layouts for row in parallel_steps(path, shipped())]
    made = collect()
    path = file_of(arguments.output, "cost-compare", made)
    content = {
        "layers": found_layers,
        "steps": found_steps,
        "engine steps": found_engine,
        "steps by layout": found_parallel,
    }
    write(path, made, "modelled, against measured", content)
    show(found_layers, found_steps, found_engine, runs)
    print(*summary(found_parallel), path, sep="\n")


def show(
    found_layers: list[dict[str, Any]],
    found_steps: list[dict[str, Any]],
    found_engine: list[dict[str, Any]],
    runs: list[Path],
) -> None:
    """Every row, then mean and worst error by kind of rows."""
    for row in found_layers:
        end = " (fitted)" if row["fitted"] else ""
        print(f"{row['gpu']} {row['what']:60s} T={row['tokens']:<5d} {row['error']:+7.1%}{end}")
    for row in [*found_steps, *found_engine]:
        print(
            f"{row['what']:52s} {row['concurrency']:4d} {row['measured_ms']:7.2f} ms "
            f"{row['predicted_ms']:7.2f} {row['error']:+6.1%}{' (fitted)' if row['fitted'] else ''}"
        )
    unseen = [row for row in found_layers if not row["fitted"]]
    for name, rows, limit in (
        ("leanmoe's layers", [r for r in unseen if r["what"].startswith("leanmoe")], LAYER_LIMIT),
        ("vLLM's layers", [r for r in unseen if r["what"].startswith("vLLM")], LAYER_LIMIT),
        ("steps of the readings", [r for r in found_steps if not r["fitted"]], STEP_LIMIT),
        *(
            (f"{of} of {path.stem[11:]}, {kind}", rows, STEP_LIMIT)
            for path in runs
            for of in ("step", "TPOT")
            for kind, rows in _by_plan(
                [r for r in found_engine if (r["file"], r["of"]) == (path.name, of)]
            )
        ),
    ):
        if rows:
            off = np.abs([row["error"] for row in rows])
            print(
                f"{name}: mean {off.mean():.1%}, worst {off.max():.1%}, "
                f"{(off <= limit).sum()} of {len(off)} within {limit:.0%}"
            )
        else:
            print(f"{name}: nothing measured is there to compare with")


if __name__ == "__main__":
    main()
