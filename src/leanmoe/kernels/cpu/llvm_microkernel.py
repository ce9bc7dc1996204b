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
CACHE_LINE = 64
AHEAD = 4096
"""How far before its use a weight is asked for: the processor's own prefetch ends with a page."""


def _blocking() -> tuple[int, int, int]:
    """(lanes of a vector, vectors of a panel, rows of a block) that fill the registers."""
    features = llvm.get_host_cpu_features()
    if features.get("avx512f"):
        return 16, 4, 6  # 32 registers
    if platform.machine().lower() in ("arm64", "aarch64"):
        return 4, 4, 6  # 32 registers
    return 8, 2, 6  # 16 registers


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

    def prefetch(self, address, size):
        """Asks for the next `size` bytes; harmless beyond the end of the weights."""
        byte = ir.IntType(8).as_pointer()
        signature = ir.FunctionType(ir.VoidType(), [byte, I32, I32, I32])
        module = self.builder.module
        function = cgutils.get_or_insert_function(module, signature, "llvm.prefetch.p0")
        for line in range(0, size, CACHE_LINE):
            where = self.builder.inttoptr(self.plus(address, line), byte)
            self.builder.call(function, [where, I32(0), I32(3), I32(1)])

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

    def number(self, value):
        return ir.Constant(self.vector, [value] * LANES)

    def clamp(self, x, least, most):
        """NaN stays NaN: neither comparison holds for it."""
        for limit, sign in ((most, ">"), (least, "<")):
            beyond = self.builder.fcmp_ordered(sign, x, self.number(limit))
            x = self.builder.select(beyond, self.number(limit), x)
        return x

    def exp(self, x):
        """e^x to 2 units in the last place; saturates beyond +-87, NaN stays NaN.

        Polynomial and split of ln 2 as in the Cephes library's expf.
        """
        builder = self.builder
        x = self.clamp(x, -87.0, 87.0)
        magic = self.number(12582912.0)  # adding 1.5 x 2^23 rounds to a whole number, low bits
        shifted = self.multiply_add(x, self.number(1.4426950408889634), magic)
        whole = builder.fsub(shifted, magic)
        rest = self.multiply_add(whole, self.number(-0.693359375), x)
        rest = self.multiply_add(whole, self.number(2.12194440e-4), rest)
        total = self.number(1.9875691500e-4)
        # fmt: off
        for coefficient in (
            1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1,
            1.0, 1.0,
        ):
            # fmt: on
            total = self.multiply_add(total, rest, self.number(coefficient))
        bits = builder.bitcast(shifted, self.words)
        power = builder.shl(bits, ir.Constant(self.words, [23] * LANES))
        power = builder.add(power, ir.Constant(self.words, [0x3F800000] * LANES))
        return builder.fmul(total, builder.bitcast(power, self.vector))

    def weights(self, address, vectors, is_bf16):
        """One row of a panel as float32 vectors. bf16 is the upper half of a float32."""
        if not is_bf16:
            places = (self.plus(address, c * LANES * BYTES) for c in range(vectors))
            return [self.load(place, self.vector) for place in places]
        builder, widened = self.builder, []
        for pair in range(vectors // 2):
            word = self.load(self.plus(address, pair * LANES * BYTES), self.words)
            low = builder.shl(word, ir.Constant(self.words, [16] * LANES))
            high = builder.and_(word, ir.Constant(self.words, [-65536] * LANES))
            widened += [builder.bitcast(low, self.vector), builder.bitcast(high, self.vector)]
        return widened


def _product(rows: int, vectors: int, is_bf16: bool):
    """An intrinsic: product(x_rows, w, count, initial, out, out_stride).

    `x_rows` is the address of the addresses of the rows, so rows need not lie together. Addresses
    are integers, the stride is in elements, `count` is at least 1.
    """

    @intrinsic
    def product(_typing, x_rows, w, count, initial, out, out_stride):
        def generate(context, builder, _signature, arguments):
            _emit_product(builder, arguments, rows, vectors, is_bf16)
            return context.get_dummy_value()

        return types.void(*(types.int64,) * 6), generate

    return product


def _emit_product(builder, arguments, rows, vectors, is_bf16):
    x_rows, w, count, initial, out, out_stride = arguments
    emit = _Emit(builder)
    x_row = [emit.load(emit.plus(x_rows, 2 * BYTES * r), I64) for r in range(rows)]
    out_row = [out]
    for _ in range(rows - 1):
        out_row.append(builder.add(out_row[-1], builder.mul(out_stride, I64(BYTES))))
    columns = [c * LANES * BYTES for c in range(vectors)]
    start = [emit.load(emit.plus(initial, column), emit.vector) for column in columns]

    before, loop = builder.block, builder.append_basic_block("product.loop")
    after = builder.append_basic_block("product.after")
    builder.branch(loop)
    builder.position_at_end(loop)
    index, row_address = builder.phi(I64), builder.phi(I64)
    sums = [[builder.phi(emit.vector) for _ in columns] for _ in range(rows)]
    row_size = vectors * LANES * (BYTES // 2 if is_bf16 else BYTES)
    emit.prefetch(emit.plus(row_address, AHEAD), row_size)
    w_row = emit.weights(row_address, vectors, is_bf16)
    offset = builder.mul(index, I64(BYTES))
    totals = []
    for r in range(rows):
        value = emit.everywhere(emit.load(builder.add(x_row[r], offset), F32))
        totals.append([emit.multiply_add(w_row[c], value, sums[r][c]) for c in range(vectors)])
    next_index = builder.add(index, I64(1))
    next_row = emit.plus(row_address, row_size)
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


def products(vectors: int, is_bf16: bool):
    """The products of 1 to `ROWS` rows with a panel of that many vectors."""
    return tuple(_product(rows, vectors, is_bf16) for rows in range(1, ROWS + 1))


def _sigmoid_times(slope):
    """An intrinsic over `vectors` whole vectors at an address, in place: x sigmoid(slope(x))."""

    @intrinsic
    def activate(_typing, address, vectors, alpha):
        def generate(context, builder, _signature, arguments):
            address, vectors, alpha = arguments
            emit = _Emit(builder)
            with cgutils.for_range(builder, vectors, intp=I64) as loop:
                at = builder.add(address, builder.mul(loop.index, I64(LANES * BYTES)))
                x = emit.load(at, emit.vector)
                power = emit.exp(builder.fsub(emit.number(0.0), slope(emit, x, alpha)))
                emit.store(builder.fdiv(x, builder.fadd(emit.number(1.0), power)), at)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.float32), generate

    return activate


def _scaled(emit, x, alpha):
    return emit.builder.fmul(x, emit.everywhere(alpha))


def _tanh_slope(emit, x, _alpha):
    # 0.5 x (1 + tanh z) is x sigmoid(2 z), with z = sqrt(2/pi) (x + 0.044715 x^3)
    square = emit.builder.fmul(x, x)
    slope = emit.multiply_add(
        square, emit.number(0.044715 * 1.5957691216057308), emit.number(1.5957691216057308)
    )
    return emit.builder.fmul(x, slope)


silu, gelu_tanh = _sigmoid_times(_scaled), _sigmoid_times(_tanh_slope)


def _each(function):
    """An intrinsic over `vectors` whole vectors at an address, in place."""

    @intrinsic
    def apply(_typing, address, vectors):
        def generate(context, builder, _signature, arguments):
            address, vectors = arguments
            emit = _Emit(builder)
            with cgutils.for_range(builder, vectors, intp=I64) as loop:
                at = builder.add(address, builder.mul(loop.index, I64(LANES * BYTES)))
                emit.store(function(emit, emit.load(at, emit.vector)), at)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), generate

    return apply


def _sigmoid(emit, x):
    builder, one = emit.builder, emit.number(1.0)
    return builder.fdiv(one, builder.fadd(one, emit.exp(builder.fsub(emit.number(0.0), x))))


sigmoid, exponential = _each(_sigmoid), _each(_Emit.exp)


def _values_at(element, kind):
    """An intrinsic: the values at an address, as a pointer for `carray`."""

    @intrinsic
    def values_at(_typing, address):
        def generate(_context, builder, _signature, arguments):
            return builder.inttoptr(arguments[0], kind.as_pointer())

        return types.CPointer(element)(types.int64), generate

    return values_at


floats_at, ints_at = _values_at(types.float32, F32), _values_at(types.int32, I32)
bytes_at, longs_at = _values_at(types.uint8, ir.IntType(8)), _values_at(types.int64, I64)


@intrinsic
def call_int(_typing, function):
    """Calls the C function `int f(void)` at an address."""

    def generate(_context, builder, _signature, arguments):
        kind = ir.FunctionType(I32, [])
        return builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), [])

    return types.int32(types.int64), generate


@intrinsic
def call_team(_typing, function, worker, argument, threads):
    """Calls `GOMP_parallel(worker, argument, threads, 0)`, whose address is `function`."""

    def generate(context, builder, _signature, arguments):
        address, worker, argument, threads = arguments
        byte = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte, byte, I32, I32])
        worker, argument = builder.inttoptr(worker, byte), builder.inttoptr(argument, byte)
        values = [worker, argument, builder.trunc(threads, I32), I32(0)]
        builder.call(builder.inttoptr(address, kind.as_pointer()), values)
        return context.get_dummy_value()

    return types.void(*(types.int64,) * 4), generate
