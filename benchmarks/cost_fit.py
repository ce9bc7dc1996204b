"""How far off is the cost model on layers it has not seen, and what are its constants?

    python benchmarks/cost_fit.py --write-constants

Reads AIConfigurator's measured tables from the installed package (pip install 'leanmoe[predict]').
Per kernel and format: constants are fitted on half of the shapes, never on one with k = 6, and
tested on the other half and on every row with k = 6. A shape is hidden and expert width, experts,
k and both parallelisms, held out whole. The domain is fine-grained experts on a GPU as it would
serve them; rows outside it are counted and shown, not fitted. `--write-constants` writes the
constants, ours, that come with leanmoe (src/leanmoe/cost/fitted).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from cost_rates import rates

from leanmoe import provenance
from leanmoe.cost.activation import Activation, assumed_curves
from leanmoe.cost.constants import (
    FITTED,
    Accuracy,
    Constants,
    KernelConstants,
    write_constants,
)
from leanmoe.cost.deployment import Deployment
from leanmoe.cost.fit import (
    OTHER_TILES,
    TRITON_TILES,
    Reading,
    accuracy,
    errors_of,
    fit,
)
from leanmoe.cost.hardware import GPUS, Gpu
from leanmoe.cost.models import published_model
from leanmoe.cost.routing import Assumed
from leanmoe.cost.step import Batch, StepTime
from leanmoe.cost.tables import (
    ACTIVATION_BYTES,
    PACKAGE,
    TABLES,
    UNGATED,
    VERSION,
    WEIGHT_BYTES,
    Measured,
    Table,
    read_table,
)
from leanmoe.cost.work import FEATURES, ExpertsShape, Rows
from leanmoe.progress import bar
from leanmoe.shape import distinct_uniform
from leanmoe.storage import read_json, write_json

LEAST_EXPERTS, LEAST_SLOTS, MOST_SLOTS, MOST_GPUS = 64, 4, 10, 16
UNSEEN_K = 6
OUR_LAYER = {1: 165.5, 8: 1075, 16: 1910, 32: 3036, 64: 4280, 128: 4795, 256: 4946}
"""Microseconds of leanmoe's kernel on one DeepSeek-V3 layer (7168, 2048, 256 experts, k = 8, bf16,
random draws) by tokens, on one H200, 2026-11-24 (docs/kernels.md)."""
OUR_FIT = (1, 16, 64, 256)
"""Points of those that constants are fitted to; the others are a test."""
OUR_FEATURES = ("call", "weights")
OUR_MANY_FEATURES = ("call", "weights", "products", "longer", "activations", "waves")
OUR_FEW_FEATURES = ("call", "weights", "products")
"""Of one shape alone; more would be fitted to its noise."""
OUR_EDGES = (256, 16384)


def in_domain(row: Measured, table: Table) -> bool:
    """Whether a row is of fine-grained experts as a GPU would serve them."""
    if table.dtype == "w4a16_mxfp4":  # gpt-oss alone: 2880 wide, in no multiple of 128
        return row.tensor * row.expert <= MOST_GPUS and row.experts >= LEAST_EXPERTS
    return (
        row.shape(table.dtype).is_as_tested
        and row.experts >= LEAST_EXPERTS
        and LEAST_SLOTS <= row.top_k <= MOST_SLOTS
        and row.tensor * row.expert <= MOST_GPUS
        and (row.hidden, row.width) not in UNGATED
    )


def reading(row: Measured, table: Table) -> Reading:
    """A row as the fit takes it."""
    return Reading(row.shape(table.dtype), row.rows(table.kernel), row.seconds)


def halves(rows: Sequence[Measured], seed: int) -> tuple[set[Any], set[Any]]:
    """Keys of shapes to fit and to test; those with k = 6 are in neither."""
    keys = sorted({row.key for row in rows if row.top_k != UNSEEN_K})
    order = np.random.default_rng(seed).permutation(len(keys))
    half = {keys[n] for n in order[: len(keys) // 2]}
    return half, set(keys) - half


def tiles_of(table: Table) -> Mapping[int, Sequence[int]]:
    """Rows of a tile that the kernel may use, by range of tokens."""
    is_default = "triton" in table.kernel and table.dtype == "bfloat16"
    return TRITON_TILES if is_default else OTHER_TILES


def fit_table(gpu: Gpu, table: Table, seed: int) -> tuple[KernelConstants, dict[str, Any]]:
    """Constants of a kernel, and the row of the results that says how far off they are."""
    every = [r for r in read_table(gpu.name, table) if not r.is_grouped(table.kernel)]
    rows = [row for row in every if in_domain(row, table)]
    fitted, tested = halves(rows, seed)
    constants = fit(
        table.kernel,
        gpu,
        table.dtype,
        [reading(r, table) for r in rows if r.key in fitted],
        f"half of the shapes of {table.source}, {PACKAGE} {VERSION}, {gpu.name}",
        tiles=tiles_of(table),
    )
    sets: dict[str, list[Measured]] = {
        "fitted": [r for r in rows if r.key in fitted],
        "unseen half": [r for r in rows if r.key in tested],
        "every k = 6 row": [r for r in rows if r.top_k == UNSEEN_K],
        "decode of the unseen half, to 512 tokens": [
            r for r in rows if r.key in tested and r.tokens <= 512
        ],
        "outside the domain": [r for r in every if not in_domain(r, table)],
    }
    found = []
    worst: dict[str, Any] = {}
    for name, group in sets.items():
        if not group:
            continue
        errors = errors_of(constants, [reading(r, table) for r in group], gpu)
        found.append(accuracy(name, errors))
        place = int(np.abs(errors).argmax())
        worst[name] = {
            "shape": list(group[place].key),
            "tokens": group[place].tokens,
            "error": float(f"{errors[place]:.4g}"),
        }
    seen = tuple(a for a in found if a.what in ("unseen half", "every k = 6 row"))
    constants = KernelConstants(
        constants.kernel,
        constants.gpu,
        constants.dtype,
        constants.regimes,
        constants.fitted_to,
        seen,
    )
    line = {
        "kernel": table.kernel,
        "dtype": table.dtype,
        "gpu": gpu.name,
        "shapes": {"fitted": len(fitted), "tested": len(tested)},
        "accuracy": [vars(a) for a in found],
        "worst": worst,
        "grouped": _grouped(constants, gpu, table),
    }
    return constants, line


def _grouped(constants: KernelConstants, gpu: Gpu, table: Table) -> dict[str, Any] | None:
    """DeepSeek-V3's rows where the collector's router limited groups: as published, and as run."""
    rows = [r for r in read_table(gpu.name, table) if r.is_grouped(table.kernel)]
    rows = [r for r in rows if in_domain(r, table) and r.tokens >= 32]
    if not rows:
        return None
    as_run = errors_of(constants, [reading(r, table) for r in rows], gpu)
    plain = [Reading(r.shape(table.dtype), r.rows("trtllm"), r.seconds) for r in rows]
    published = errors_of(constants, plain, gpu)
    return {
        "as published": vars(accuracy("every expert can wake", published)),
        "as run": vars(accuracy("4 of 8 groups", as_run)),
    }


def transfer(constants: KernelConstants, table: Table, gpu: Gpu) -> dict[str, Any]:
    """How far off one GPU's constants are on another GPU."""
    rows = [r for r in read_table(gpu.name, table) if not r.is_grouped(table.kernel)]
    readings = [reading(r, table) for r in rows if in_domain(r, table)]
    found = accuracy(
        f"{constants.gpu}'s constants on {gpu.name}", errors_of(constants, readings, gpu)
    )
    return {"kernel": table.kernel, "dtype": table.dtype, **vars(found)}


def our_kernel(gpu: Gpu) -> tuple[KernelConstants, list[dict[str, float]]]:
    """leanmoe's own kernel from our own readings, and its error at each."""
    shape = ExpertsShape(7168, 2048, 256)

    def at(tokens: int) -> Reading:
        distinct = distinct_uniform(256, 8, tokens)
        return Reading(shape, Rows(tokens, 8, tokens * 8, distinct), OUR_LAYER[tokens] * 1e-6)

    constants = fit(
        "leanmoe",
        gpu,
        "bfloat16",
        [at(n) for n in OUR_FIT],
        "four of seven readings of one DeepSeek-V3 layer, docs/kernels.md, h200",
        edges=(16384,),
        names=OUR_FEATURES,
    )
    readings = [at(n) for n in OUR_LAYER]
    errors = errors_of(constants, readings, gpu)
    unseen = np.array([e for n, e in zip(OUR_LAYER, errors, strict=True) if n not in OUR_FIT])
    constants = KernelConstants(
        *(getattr(constants, n) for n in ("kernel", "gpu", "dtype", "regimes", "fitted_to")),
        (accuracy("our readings at tokens not fitted", unseen),),
    )
    lines = [
        {
            "tokens": n,
            "microseconds": OUR_LAYER[n],
            "predicted": round(OUR_LAYER[n] * (1 + e), 1),
            "error": float(f"{e:.4g}"),
            "fitted": n in OUR_FIT,
        }
        for n, e in zip(OUR_LAYER, errors, strict=True)
    ]
    return constants, lines


def beyond(ours: KernelConstants, others: Sequence[KernelConstants]) -> KernelConstants:
    """The readings end at 256 tokens; what is longer is carried over from the other GPU's rows."""
    same = next((each for each in others if each.dtype == ours.dtype), None)
    if same is None:
        return ours
    longer = tuple(r for r in same.regimes if r.up_to > OUR_EDGES[0])
    regimes = (replace(ours.regimes[0], up_to=OUR_EDGES[0]), *longer)
    words = f"{ours.fitted_to}; beyond {OUR_EDGES[0]} tokens {same.gpu}'s constants"
    return replace(ours, regimes=regimes, fitted_to=words)


def our_benchmark(gpu: Gpu, folder: Path) -> tuple[list[KernelConstants], list[dict[str, Any]]]:
    """leanmoe's kernel from committed results of `experts_gpu.py` on that GPU.

    Constants are fitted to the full model's rows (k = 8) alone; the test is what a plan makes of
    them: k = 6, k = 4 and guaranteed = 3. fp8 has rows of the full model and of one shape alone:
    every second number of tokens is the test there.
    """
    rows = [
        row for path in sorted(folder.glob("*-experts-gpu.json")) for row in _our_rows(path, gpu)
    ]
    kernels, lines = [], []
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        mine = [row for row in rows if row["dtype"] == dtype]
        names, edges = OUR_MANY_FEATURES, OUR_EDGES
        if all(row["rule"] == "k=8" for row in mine):
            held = set(sorted({row["tokens"] for row in mine})[1:-1:2])
            names, edges = OUR_FEW_FEATURES, OUR_EDGES[-1:]
            fitted = [row for row in mine if row["tokens"] not in held]
        else:
            fitted = [row for row in mine if row["rule"] == "k=8"]
        tested = [row for row in mine if row not in fitted]
        found = fit(
            "leanmoe",
            gpu,
            dtype,
            [row["reading"] for row in fitted],
            f"the full model's rows of leanmoe's benchmark on {gpu.name} (benchmarks/results)",
            edges,
            names,
        )
        groups = {
            "plans and tokens not fitted, to 256 tokens": [r for r in tested if r["tokens"] <= 256],
            "plans and tokens not fitted, 4,096 tokens": [r for r in tested if r["tokens"] > 256],
        }
        off = tuple(
            accuracy(what, errors_of(found, [row["reading"] for row in group], gpu))
            for what, group in groups.items()
            if group
        )
        kernels.append(replace(found, accuracy=off))
        lines += [{"dtype": dtype, "gpu": gpu.name, **vars(each)} for each in off]
    return kernels, lines


def _our_rows(path: Path, gpu: Gpu) -> Iterator[dict[str, Any]]:
    found = read_json(path, "results")
    if gpu.name not in found["provenance"]["hardware"].lower():
        return
    for line in [*found["lines"], *found["rules"]]:
        experts, hidden, rest = line["shape"].split(" x ")
        width, dtype = rest.split(" ")
        name = "fp8_block" if "float8" in dtype else dtype
        shape = ExpertsShape(
            int(hidden),
            int(width),
            int(experts),
            weight_bytes=WEIGHT_BYTES[name],
            activation_bytes=ACTIVATION_BYTES.get(name, 2.0),
        )
        tokens = line["tokens"]
        rows = Rows(tokens, line["rows"] / tokens, line["rows"], line["distinct"])
        yield {
            "dtype": name,
            "rule": line["rule"],
            "tokens": tokens,
            "reading": Reading(shape, rows, line["microseconds"]["leanmoe"] * 1e-6),
        }


RESULTS = Path("benchmarks/results")
READINGS = Path("benchmarks/readings/qwen3-30b-a3b-vllm-h200.json")


def layer_seconds(constants: Constants) -> float:
    """A layer's own time: what the reading at concurrency 1 leaves over, shared by the layers."""
    readings = read_json(READINGS, "readings")
    first = next(r for r in readings["rows"] if r["concurrency"] == 1 and not r["rule"])
    model = published_model(readings["model"])
    step = StepTime(model, Deployment(GPUS[readings["hardware"]]), constants, readings["kernel"])
    activation = Activation(model, None, assumed_curves(model, Assumed()))
    modelled = step.parts(Batch(1, readings["context"]), activation).total
    return max(0.0, first["step_ms"] / 1e3 - modelled) / model.shape.layers


def main() -> None:
    """Fits, tests, writes JSON, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seed", type=int, default=0, help="of the halves")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--write-constants", action="store_true")
    arguments = parser.parse_args()
    where = provenance.collect("python " + " ".join(sys.argv), seed=arguments.seed)
    home, other = GPUS["h200"], GPUS["h100"]
    kernels: dict[str, list[KernelConstants]] = {home.name: [], other.name: []}
    lines, moved = [], []
    with bar("Fitting", len(TABLES), "kernels") as advance:
        for table in TABLES:
            constants, line = fit_table(home, table, arguments.seed)
            there, line_there = fit_table(other, table, arguments.seed)
            kernels[home.name].append(constants)
            kernels[other.name].append(there)
            lines += [line, line_there]
            moved.append(transfer(constants, table, other))
            advance(1)
    benchmarked, benchmark_lines = our_benchmark(other, RESULTS)
    kernels[other.name] += benchmarked
    ours, our_lines = our_kernel(home)
    kernels[home.name].append(beyond(ours, benchmarked))
    found_rates, rate_errors = {}, {}
    for gpu in (home, other):
        found_rates[gpu.name], rate_errors[gpu.name] = rates(gpu)
    own = layer_seconds(Constants(tuple(kernels["h200"]), {"h200": found_rates["h200"]}))
    made = {**where.to_json(), "tables": f"{PACKAGE} {VERSION}", "label": "fitted"}
    for name, each in found_rates.items():
        complete = replace(each, layer_seconds=float(f"{own:.4g}"))
        constants_of = Constants(tuple(kernels[name]), {name: complete}, made)
        if arguments.write_constants:
            write_constants(FITTED / f"{name}.json", constants_of)
    result = {
        "label": "modelled, against measured tables",
        "provenance": where.to_json(),
        "tables": f"{PACKAGE} {VERSION}",
        "features": list(FEATURES),
        "kernels": lines,
        "carried over": moved,
        "our layer": our_lines,
        "our benchmark": benchmark_lines,
        "rates": rate_errors,
    }
    write_json(arguments.output / f"{where.date[:10]}-{where.commit}-cost-fit.json", result)
    for line in lines:
        print(f"{line['gpu']} {line['kernel']} {line['dtype']}")
        for each in line["accuracy"]:
            print(f"    {Accuracy(**each)}")
        if line["grouped"]:
            for name, each in line["grouped"].items():
                print(f"    DeepSeek-V3 {name}: {Accuracy(**each)}")
    for each in moved:
        print(each)
    for each in [*our_lines, *benchmark_lines]:
        print(each)
    for name, errors in rate_errors.items():
        for part, each in errors.items():
            print(f"{name} {part}: {Accuracy(**each)}")


if __name__ == "__main__":
    main()
