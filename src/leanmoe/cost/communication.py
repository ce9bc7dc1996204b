"""Times of collectives, measured on somebody's GPUs, and the planner's constants from them.

`benchmarks/communication.py` writes such a file. Needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from leanmoe.cost.constants import Rates
from leanmoe.cost.hardware import Gpu
from leanmoe.errors import LeanMoeError
from leanmoe.storage import read_json

BENCHMARK = "communication"
ALL_REDUCE, ALL_TO_ALL = "all_reduce", "all_to_all"


@dataclass(frozen=True)
class Collectives:
    """Medians of one group of GPUs of one node."""

    hardware: str
    gpus: int
    seconds: Mapping[str, Mapping[int, float]]
    """By operation and bytes of one GPU's message: what it adds up, or what it sends to all
    GPUs together, itself included."""


def read_collectives(path: Path) -> Collectives:
    """Reads what the benchmark wrote; LeanMoeError where it is no such file, or damaged."""
    value = read_json(path, "communication times")
    if not isinstance(value, dict) or value.get("leanmoe_benchmark") != BENCHMARK:
        raise LeanMoeError(f"{path} is no result of benchmarks/communication.py")
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
    """The rates with their all-reduce and all-to-all as measured on GPUs of this kind.

    A call costs a constant time and its bytes at a constant rate, as `StepTime` has it. Both are
    the least squares of relative errors. One number of GPUs says nothing of a further hop: its
    cost stays as it is.
    """
    gpus = measured.gpus
    hops = (math.log2(gpus) - 1) * rates.reduce_hop
    reduce, reduce_rate = _line(measured.seconds[ALL_REDUCE], 2 * (gpus - 1) / gpus)
    exchange, exchange_rate = _line(measured.seconds[ALL_TO_ALL], (gpus - 1) / gpus)
    return replace(
        rates,
        reduce_seconds=max(0.0, reduce - hops),
        reduce_bandwidth=reduce_rate / gpu.link,
        exchange_seconds=exchange,
        exchange_bandwidth=exchange_rate / gpu.link,
        fitted_to=f"{rates.fitted_to}; collectives measured on {gpus} x {measured.hardware}",
    )


def _line(seconds: Mapping[int, float], share: float) -> tuple[float, float]:
    """Seconds of a call without bytes, and bytes a second of the `share` that travels."""
    sizes, times = (np.array(x, dtype=float) for x in (list(seconds), list(seconds.values())))
    columns = np.stack((np.ones_like(sizes), sizes * share), axis=-1) / times[:, None]
    (start, each), *_ = np.linalg.lstsq(columns, np.ones_like(times), rcond=None)
    if each <= 0:
        raise LeanMoeError("communication times do not rise with the bytes: nothing can be fitted")
    return max(0.0, float(start)), 1 / float(each)
