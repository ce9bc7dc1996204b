"""How far off is the cost model on layers it has not seen, and what are its constants?

    python -m benchmarks.predict.fit --write-constants

Reads AIConfigurator's measured tables from the installed package (pip install 'leanmoe[predict]').
Per kernel and format: constants are fitted on half of the shapes, never on one with k = 6, and
tested on the other half and on every row with k = 6. A shape is hidden and expert width, experts,
k and both parallelisms, held out whole. The domain is fine-grained experts on a GPU as it would
serve them; rows outside it are counted and shown, not fitted. `--write-constants` writes the
constants, ours, that come with leanmoe (src/leanmoe/predict/fitted).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from benchmarks.common.results import RESULTS, collect, file_of, parser_of, write
from benchmarks.predict.engine_runs import own_times
from benchmarks.predict.own_layers import beyond, our_benchmark, our_kernel
from benchmarks.predict.rates import rates
from benchmarks.predict.tile_groups import fit_table, transfer
from leanmoe.core.progress import bar
from leanmoe.predict.constants import FITTED, Accuracy, Constants, KernelConstants
from leanmoe.predict.hardware.gpus import GPUS
from leanmoe.predict.kernels.features import FEATURES
from leanmoe.predict.kernels.tables import PACKAGE, TABLES, VERSION

OTHERS = ("carried over", "our layer", "our benchmark")
"""What of the results is shown between the kernels and the rates."""


def main() -> None:
    """Fits, tests, writes JSON, prints the table."""
    parser = parser_of(__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of the halves")
    parser.add_argument("--write-constants", action="store_true")
    arguments = parser.parse_args()
    where = collect(arguments.seed)
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
    measured = Constants(tuple(kernels[other.name]), {other.name: found_rates[other.name]})
    own: dict[str, Any] = own_times(measured, RESULTS)
    made = {**where.to_json(), "tables": f"{PACKAGE} {VERSION}", "label": "fitted"}
    for name, each in found_rates.items():
        constants_of = Constants(tuple(kernels[name]), {name: replace(each, **own)}, made)
        if arguments.write_constants:
            constants_of.save(FITTED / f"{name}.json")
    result = {
        "tables": f"{PACKAGE} {VERSION}",
        "features": list(FEATURES),
        "kernels": lines,
        "carried over": moved,
        "our layer": our_lines,
        "our benchmark": benchmark_lines,
        "rates": rate_errors,
        "own times": own,
    }
    path = file_of(arguments.output, "cost-fit", where)
    write(path, where, "modelled, against measured tables", result)
    show(result)
    print(path)


def show(result: dict[str, Any]) -> None:
    """Errors by kernel, then by everything else."""
    for line in result["kernels"]:
        print(f"{line['gpu']} {line['kernel']} {line['dtype']}")
        for each in line["accuracy"]:
            print(f"    {Accuracy(**each)}")
        if line["grouped"]:
            for name, each in line["grouped"].items():
                print(f"    DeepSeek-V3 {name}: {Accuracy(**each)}")
    for other_line in (part for name in OTHERS for part in result[name]):
        print(other_line)
    for name, errors in result["rates"].items():
        for part, each in errors.items():
            print(f"{name} {part}: {Accuracy(**each)}")


if __name__ == "__main__":
    main()
