"""Programs as C functions, with and without a cache on disk."""

from __future__ import annotations

import ctypes

import pytest
from numba import cfunc

from leanmoe.kernels.cpu import numba_compile
from leanmoe.kernels.cpu.numba_compile import compile_program, stamp_of


def first_two(fields):  # type: ignore[no-untyped-def]  # numba infers the type
    return fields[0] + fields[1]


def test_a_program_is_a_c_function_of_its_fields() -> None:
    run = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p)(compile_program(first_two))
    fields = (ctypes.c_int64 * 2)(40, 2)
    assert run(ctypes.addressof(fields)) == 42


def test_a_program_that_cannot_be_cached_is_compiled_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:

    def cannot_cache(*types: object, cache: bool = False, **options: object) -> object:
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return cfunc(*types, **options)

    monkeypatch.setattr(numba_compile, "cfunc", cannot_cache)
    assert compile_program(first_two)


def test_the_stamp_changes_with_the_files() -> None:
    assert stamp_of("gemm.py") == stamp_of("gemm.py") != stamp_of("gemm.py", "packing.py")
