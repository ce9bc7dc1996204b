"""torch's own OpenMP threads, lent to the CPU kernel.

A second pool of threads beside torch's would fight it for the cores: both spin while they wait.
numba's own pool is such a second one wherever torch brings its libgomp along, as its wheels do.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Team:
    """Addresses of the C functions that run one function in all threads and tell them apart."""

    parallel: int
    thread_number: int


@functools.cache
def find_team() -> Team | None:
    """torch's OpenMP, if it is one with GNU's interface (GNU's and LLVM's have it)."""
    for library in sorted((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*")):
        try:
            found = ctypes.CDLL(str(library))
            # Looked up in the library's own dependencies, so it is the pool torch itself uses.
            names = ("GOMP_parallel", "omp_get_thread_num")
            functions = [getattr(found, name) for name in names]
        except (OSError, AttributeError):
            continue
        addresses = [ctypes.cast(function, ctypes.c_void_p).value for function in functions]
        if all(addresses):
            return Team(*(address or 0 for address in addresses))
    return None
