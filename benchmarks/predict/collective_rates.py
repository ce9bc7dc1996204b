"""Collectives as `communication` measured them, as constants for `leanmoe predict --constants`.

    python -m benchmarks.predict.collective_rates A-communication.json --gpu h100 -o constants.json

Everything else stays as it is shipped, or as `--constants` has it: a file of `leanmoe calibrate`.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common.results import collect
from leanmoe.core.errors import LeanMoeError
from leanmoe.core.files import read_json
from leanmoe.predict.constants import Constants, shipped
from leanmoe.predict.hardware.gpus import Gpu, Rates, read_gpu

BENCHMARK = "communication"
ALL_REDUCE, ALL_TO_ALL = "all_reduce", "all_to_all"
GATHERING = ("all_gather", "reduce_scatter")


@dataclass(frozen=True)
class Collectives:
    """Medians of one group of GPUs of one node."""

    hardware: str
    gpus: int
    seconds: Mapping[str, Mapping[int, float]]
    """By operation and bytes of one GPU's message: what it adds up, or what it sends to all
    GPUs, itself included."""


def read_collectives(path: Path) -> Collectives:
    """Reads what the benchmark wrote; LeanMoeError where it is no such file, or damaged."""
    value = read_json(path, "communication times")
    if not isinstance(value, dict) or value.get("leanmoe_benchmark") != BENCHMARK:
        raise LeanMoeError(f"{path} is no result of benchmarks/predict/communication.py")
    try:
        seconds = {
            name: {int(size): _positive(entry["median"]) for size, entry in sizes.items()}
            for name, sizes in value["seconds"].items()
        }
        found = Collectives(str(value["provenance"]["hardware"]), int(value["gpus"]), seconds)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise LeanMoeError(f"communication times {path} are damaged ({reason})") from error
    if found.gpus < 2 or any(len(found.seconds.get(n, {})) < 2 for n in (ALL_REDUCE, ALL_TO_ALL)):
        raise LeanMoeError(
            f"communication times {path} have too little to fit to: at least 2 GPUs, and 2 sizes "
            f"of {ALL_REDUCE} and {ALL_TO_ALL} are needed"
        )
    return found


def _positive(value: Any) -> float:
    if not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"a time is {value!r}")
    return float(value)


def fitted(rates: Rates, measured: Collectives, gpu: Gpu) -> Rates:
    """The rates with the library's collectives as measured on GPUs of this kind.

    An engine's own all-reduce is not among them and stays as it is. A call costs a constant time
    and its bytes at a constant rate. Both are the least squares of relative errors. One number of
    GPUs says nothing of a further hop: its cost stays as it is.
    """
    gpus = measured.gpus
    hops, share = math.log2(gpus) - 1, (gpus - 1) / gpus
    reduce, reduce_rate = _line([measured.seconds[ALL_REDUCE]], 2 * share)
    exchange, exchange_rate = _line([measured.seconds[ALL_TO_ALL]], share)
    found = replace(
        rates,
        library_seconds=max(0.0, reduce - hops * rates.library_hop),
        library_bandwidth=reduce_rate / gpu.link,
        exchange_seconds=exchange,
        exchange_bandwidth=exchange_rate / gpu.link,
        fitted_to=f"{rates.fitted_to}; collectives measured on {gpus} x {measured.hardware}",
    )
    gathering = [measured.seconds[name] for name in GATHERING if measured.seconds.get(name)]
    if not gathering:
        return found
    gather, gather_rate = _line(gathering, share)
    return replace(
        found,
        gather_seconds=max(0.0, gather - hops * rates.gather_hop),
        gather_bandwidth=gather_rate / gpu.link,
    )


def _line(operations: Sequence[Mapping[int, float]], share: float) -> tuple[float, float]:
    """Seconds of a call without bytes, and bytes a second of the `share` that travels; of all
    these operations alike."""
    points = [point for seconds in operations for point in seconds.items()]
    sizes, times = np.array(points, dtype=float).T
    columns = np.stack((np.ones_like(sizes), sizes * share), axis=-1) / times[:, None]
    (start, each), *_ = np.linalg.lstsq(columns, np.ones_like(times), rcond=None)
    if each <= 0:
        raise LeanMoeError("communication times do not rise with the bytes: nothing can be fitted")
    return max(0.0, float(start)), 1 / float(each)


def with_collectives(constants: Constants, measured: Path, gpu: Gpu) -> Constants:
    """The constants with the rates of a file of collectives before them."""
    rates, _ = constants.rates_for(gpu.name)
    own = fitted(rates, read_collectives(measured), gpu)
    return constants.merged(Constants((), {gpu.name: own}))


def main() -> None:
    """Fits, and writes the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("measured", type=Path, help="what communication.py wrote")
    parser.add_argument("--gpu", required=True, help="a GPU's name, or a JSON file of one")
    parser.add_argument("--constants", type=Path, help="constants to build on")
    parser.add_argument("-o", "--output", type=Path, default=Path("constants.json"))
    arguments = parser.parse_args()
    gpu = read_gpu(arguments.gpu)
    own = Constants((), {}) if arguments.constants is None else Constants.load(arguments.constants)
    every = with_collectives(shipped().merged(own), arguments.measured, gpu)
    made = {**collect().to_json(), "label": "measured", "gpu": gpu.name}
    Constants(own.kernels, {gpu.name: every.rates[gpu.name]}, made).save(arguments.output)
    print(every.rates[gpu.name])


if __name__ == "__main__":
    main()
