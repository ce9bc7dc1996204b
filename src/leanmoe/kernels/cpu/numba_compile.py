"""How the CPU programs are compiled: for this processor, and kept on disk where that can be."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba import cfunc, types

COMPILE = {"error_model": "numpy", "fastmath": {"contract"}, "nogil": True}
"""No assumption that numbers are finite; fused multiply-add allowed."""

_keep: list[Any] = []
"""Compiled code lives as long as its Python object."""


def compile_program(program: Callable[[Any], int]) -> int:
    """Address of `program` as a C function, int64 f(int64 *fields)."""
    compile_with = functools.partial(cfunc, types.int64(types.CPointer(types.int64)), **COMPILE)
    try:
        compiled = compile_with(cache=True)(program)
    except RuntimeError as error:
        if "cannot cache" not in str(error):  # numba found no folder that it can write
            raise
        compiled = compile_with()(program)
    _keep.append(compiled)
    return int(compiled.address)


def stamp_of(*names: str) -> str:
    """Changes with any of these files beside this one: numba's own cache looks at one file only."""
    folder = Path(__file__).parent
    return hashlib.sha256(b"".join((folder / name).read_bytes() for name in names)).hexdigest()
