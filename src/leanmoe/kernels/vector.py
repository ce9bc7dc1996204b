"""The inner product of the CPU kernel, written as LLVM vector code for the processor at hand.

numba compiles it, so no C compiler is needed; LLVM turns the vectors into whatever the processor
has. A block of rows is held against a panel of columns, all sums in registers:
    out[r, c] = initial[c] + sum_i x[r, i] * w[i, c]

Plain loops would leave the sums in memory; LLVM's own vectoriser does not block over rows.
"""

# mypy: ignore-errors
# ruff: noqa: ARG001
# numba infers the types, and reads an intrinsic's arguments from its signature.

from __future__ import annotations

import platform

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

F32, I16, I32, I64 = ir.FloatType(), ir.IntType(16), ir.IntType(32), ir.IntType(64)
BYTES = 4
"""Of a float32, and of a word of two bf16 weights."""


def _blocking() -> tuple[int, int, int]:
    """(lanes of a vector, vectors of a panel, rows of a block) that fill the registers."""
    features = llvm.get_host_cpu_features()
    if features.get("avx512f"):
        return 16, 6, 4  # 32 registers
    if platform.machine().lower() in ("arm64", "aarch64"):
        return 4, 6, 4  # 32 registers
    return 8, 2, 4  # 16 registers


LANES, PANEL, ROWS = _blocking()


class _Emit:
    """Short names for the few vector instructions the product needs."""

    def __init__(self, builder: ir.IRBuilder) -> None:
        self.builder = builder
        self.vector = ir.VectorType(F32, LANES)
        self.words = ir.VectorType(I32, LANES)
        signature = ir.FunctionType(self.vector, [self.vector] * 3)
        # fmuladd, not fma: without a fused instruction fma becomes a library call per lane.
        self.fused = cgutils.get_or_insert_function(
            builder.module, signature, f"llvm.fmuladd.v{LANES}f32"
        )

    def pointer(self, address, kind):
        return self.builder.inttoptr(address, kind.as_pointer())

    def plus(self, address, count):
        return self.builder.add(address, I64(count)) if count else address

    def load(self, address, kind):
        return self.builder.load(self.pointer(address, kind), align=BYTES)

    def store(self, value, address):
        self.builder.store(value, self.pointer(address, self.vector), align=BYTES)

    def everywhere(self, scalar):
        undefined = ir.Constant(self.vector, ir.Undefined)
        first = self.builder.insert_element(undefined, scalar, I32(0))
        return self.builder.shuffle_vector(first, undefined, ir.Constant(self.words, [0] * LANES))

    def multiply_add(self, left, right, total):
        return self.builder.call(self.fused, [left, right, total])

    def weights(self, address, vectors, is_bf16):
        """One row of a panel as float32 vectors. bf16 is the upper half of a float32."""
        if not is_bf16:
            return [
                self.load(self.plus(address, c * LANES * BYTES), self.vector)
                for c in range(vectors)
            ]
        builder, found = self.builder, []
        for pair in range(vectors // 2):
            word = self.load(self.plus(address, pair * LANES * BYTES), self.words)
            low = builder.shl(word, ir.Constant(self.words, [16] * LANES))
            high = builder.and_(word, ir.Constant(self.words, [-65536] * LANES))
            found += [builder.bitcast(low, self.vector), builder.bitcast(high, self.vector)]
        return found


def _product(rows: int, vectors: int, is_bf16: bool):
    """An intrinsic: product(x, x_stride, w, count, initial, out, out_stride).

    Addresses as integers, strides in elements, `count` at least 1.
    """

    @intrinsic
    def product(_typing, x, x_stride, w, count, initial, out, out_stride):
        def generate(context, builder, _signature, arguments):
            _emit_product(builder, arguments, rows, vectors, is_bf16)
            return context.get_dummy_value()

        return types.void(*(types.int64,) * 7), generate

    return product


def _emit_product(builder, arguments, rows, vectors, is_bf16):
    x, x_stride, w, count, initial, out, out_stride = arguments
    emit = _Emit(builder)
    x_row, out_row = [x], [out]
    for _ in range(rows - 1):
        x_row.append(builder.add(x_row[-1], builder.mul(x_stride, I64(BYTES))))
        out_row.append(builder.add(out_row[-1], builder.mul(out_stride, I64(BYTES))))
    columns = [c * LANES * BYTES for c in range(vectors)]
    start = [emit.load(emit.plus(initial, column), emit.vector) for column in columns]

    before, loop = builder.block, builder.append_basic_block("product.loop")
    after = builder.append_basic_block("product.after")
    builder.branch(loop)
    builder.position_at_end(loop)
    index, row_address = builder.phi(I64), builder.phi(I64)
    sums = [[builder.phi(emit.vector) for _ in columns] for _ in range(rows)]
    w_row = emit.weights(row_address, vectors, is_bf16)
    offset = builder.mul(index, I64(BYTES))
    totals = []
    for r in range(rows):
        value = emit.everywhere(emit.load(builder.add(x_row[r], offset), F32))
        totals.append([emit.multiply_add(w_row[c], value, sums[r][c]) for c in range(vectors)])
    next_index = builder.add(index, I64(1))
    next_row = emit.plus(row_address, vectors * LANES * (BYTES // 2 if is_bf16 else BYTES))
    index.add_incoming(I64(0), before)
    index.add_incoming(next_index, loop)
    row_address.add_incoming(w, before)
    row_address.add_incoming(next_row, loop)
    for r in range(rows):
        for c in range(vectors):
            sums[r][c].add_incoming(start[c], before)
            sums[r][c].add_incoming(totals[r][c], loop)
    builder.cbranch(builder.icmp_signed("<", next_index, count), loop, after)

    builder.position_at_end(after)
    for r in range(rows):
        for c in range(vectors):
            emit.store(totals[r][c], emit.plus(out_row[r], columns[c]))


f32_1x2, f32_2x2, f32_3x2, f32_4x2 = (_product(r, 2, False) for r in (1, 2, 3, 4))
f32_1x4, f32_2x4, f32_3x4, f32_4x4 = (_product(r, 4, False) for r in (1, 2, 3, 4))
f32_1x6, f32_2x6, f32_3x6, f32_4x6 = (_product(r, 6, False) for r in (1, 2, 3, 4))
bf16_1x2, bf16_2x2, bf16_3x2, bf16_4x2 = (_product(r, 2, True) for r in (1, 2, 3, 4))
bf16_1x4, bf16_2x4, bf16_3x4, bf16_4x4 = (_product(r, 4, True) for r in (1, 2, 3, 4))
bf16_1x6, bf16_2x6, bf16_3x6, bf16_4x6 = (_product(r, 6, True) for r in (1, 2, 3, 4))


@intrinsic
def bits_of(_typing, value):
    """The bits of a float32 as an int32."""

    def generate(_context, builder, _signature, arguments):
        return builder.bitcast(arguments[0], I32)

    return types.int32(types.float32), generate


@intrinsic
def from_bits(_typing, value):
    """The float32 with these bits."""

    def generate(_context, builder, _signature, arguments):
        return builder.bitcast(arguments[0], F32)

    return types.float32(types.int32), generate


@intrinsic
def floats_at(_typing, address):
    """The float32 values at an address, as a pointer for `carray`."""

    def generate(_context, builder, _signature, arguments):
        return builder.inttoptr(arguments[0], F32.as_pointer())

    return types.CPointer(types.float32)(types.int64), generate


@intrinsic
def ints_at(_typing, address):
    """The int32 values at an address, as a pointer for `carray`."""

    def generate(_context, builder, _signature, arguments):
        return builder.inttoptr(arguments[0], I32.as_pointer())

    return types.CPointer(types.int32)(types.int64), generate


@intrinsic
def longs_at(_typing, address):
    """The int64 values at an address, as a pointer for `carray`."""

    def generate(_context, builder, _signature, arguments):
        return builder.inttoptr(arguments[0], I64.as_pointer())

    return types.CPointer(types.int64)(types.int64), generate


@intrinsic
def call_int(_typing, function):
    """Calls the C function `int f(void)` at an address."""

    def generate(_context, builder, _signature, arguments):
        kind = ir.FunctionType(I32, [])
        return builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), [])

    return types.int32(types.int64), generate


@intrinsic
def call_void(_typing, function):
    """Calls the C function `void f(void)` at an address."""

    def generate(context, builder, _signature, arguments):
        kind = ir.FunctionType(ir.VoidType(), [])
        builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), [])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def call_team(_typing, function, worker, argument, threads):
    """Calls `GOMP_parallel(worker, argument, threads, 0)`, whose address is `function`."""

    def generate(context, builder, _signature, arguments):
        address, worker, argument, threads = arguments
        byte = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte, byte, I32, I32])
        builder.call(
            builder.inttoptr(address, kind.as_pointer()),
            [
                builder.inttoptr(worker, byte),
                builder.inttoptr(argument, byte),
                builder.trunc(threads, I32),
                I32(0),
            ],
        )
        return context.get_dummy_value()

    return types.void(*(types.int64,) * 4), generate
