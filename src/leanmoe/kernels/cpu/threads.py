"""torch's own OpenMP threads, lent to the CPU kernel.

A second pool of threads beside torch's would fight it for the cores: both spin while they wait.
numba's own pool is such a second one wherever torch brings its libgomp along, as its wheels do.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Team:
    """Addresses of the C functions that run one function in all threads and tell them apart."""

    parallel: int
    thread_number: int


@functools.cache
def find_team() -> Team | None:
    """torch's OpenMP, if it is one with GNU's interface (GNU's and LLVM's have it)."""
    functions = openmp_functions("GOMP_parallel", "omp_get_thread_num")
    addresses = [ctypes.cast(f, ctypes.c_void_p).value for f in functions]
    return Team(*(address or 0 for address in addresses)) if len(addresses) == 2 else None


@functools.cache
def openmp_functions(*names: str) -> tuple[Any, ...]:
    """Functions of the OpenMP library that torch itself uses; none if one of them is missing."""
    for library in sorted((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*")):
        try:
            # Looked up in the library's own dependencies, so it is the pool torch itself uses.
            return tuple(getattr(ctypes.CDLL(str(library)), name) for name in names)
        except (OSError, AttributeError):
            continue
    return ()


PAUSE_SOFT = 1
"""omp_pause_soft of OpenMP 5.0: free what threads hold, keep what programs set."""


def release_threads() -> bool:
    """Ends the worker threads that torch keeps for the calling thread; whether there was a way.

    They come back with the caller's next parallel operation. Call it before another thread takes
    over the model: GNU's OpenMP counts the workers of both, finds more than cores, and puts every
    worker to sleep after every operation, which makes a small model half as fast
    (docs/results/throughput.md).
    """
    pause = openmp_functions("omp_pause_resource_all")
    return bool(pause) and pause[0](PAUSE_SOFT) == 0
