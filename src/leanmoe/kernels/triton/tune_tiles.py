"""Finds the fastest tiles for a shape on the GPU at hand: compiles in parallel, times in graphs."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from leanmoe.core.errors import LeanMoeError
from leanmoe.kernels.reference import experts_reference
from leanmoe.kernels.triton.config import ExpertsConfig, Tile
from leanmoe.kernels.triton.expert_blocks import ExpertBlocks, expert_blocks_reference
from leanmoe.kernels.triton.experts import FP8, experts_gpu
from leanmoe.kernels.triton.launch import MOST_FLOAT32_TOKENS, ExpertsCall, operands, settle_keys
from leanmoe.kernels.triton.search_tiles import base_configs, is_fp8, tiles
from leanmoe.kernels.triton.timing import time_calls
from leanmoe.kernels.triton.tuned_tiles import Shape
from leanmoe.kernels.weights import ExpertWeights

Product = str
FIRST, SECOND = "gate_up", "down"
FINALISTS = 6
"""So many of a product's tiles are timed with care."""
TunedShape = tuple[Shape, list[tuple[int, ExpertsConfig, float]]]
Inputs = tuple[Tensor, Tensor, Tensor]
"""Hidden states (T,D), ids and weights (T,K)."""
MOST_ERROR = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 1e-2, "float8_e4m3fn": 4e-2}
"""Relative, against float64, by the dtype of the weights: what is further off is not taken."""
EXACT_TOKENS = 16
"""So many tokens of a call are computed in float64, too."""
Progress = Callable[[str, int, int], None]
"""What is being done, how much of it is done, how much there is."""


def random_weights(shape: Shape, device: str = "cuda", seed: int = 0) -> ExpertWeights:
    """A gated layer of that shape, outputs of the order of 1, drawn expert by expert."""
    dtype = getattr(torch, shape.dtype)
    made: dict[str, Any] = {"dtype": dtype, "device": device}
    sizes = ((2 * shape.width, shape.hidden), (shape.hidden, shape.width))
    drawn = [
        torch.empty(shape.experts, *(size[::-1] if shape.is_transposed else size), **made)
        for size in sizes
    ]
    if device != "meta":
        generator = torch.Generator(device).manual_seed(seed)
        for matrix in (matrix for weight in drawn for matrix in weight):
            values = torch.randn(matrix.shape, generator=generator, device=device)
            inputs = matrix.shape[0 if shape.is_transposed else 1]
            matrix.copy_(values if dtype == FP8 else values / inputs**0.5)
    scales: dict[str, Tensor] = {}
    if dtype == FP8:
        for name, (rows, columns) in zip(("gate_up_scale", "down_scale"), sizes, strict=True):
            blocks = (shape.experts, -(-rows // 128), -(-columns // 128))
            scales[name] = torch.full(blocks, columns**-0.5, device=device)
    return ExpertWeights(
        drawn[0], drawn[1], is_transposed=shape.is_transposed,
        gate_up_scale=scales.get("gate_up_scale"), down_scale=scales.get("down_scale"),
    )  # fmt: skip


def random_call(shape: Shape, tokens: int, seed: int, device: str = "cuda") -> Inputs:
    """Hidden states, distinct random experts for each token, and weights that sum to 1."""
    generator = torch.Generator(device).manual_seed(seed)
    dtype = torch.bfloat16 if shape.dtype.startswith("float8") else getattr(torch, shape.dtype)
    hidden_TD = torch.randn(tokens, shape.hidden, generator=generator, device=device).to(dtype)
    scores_TE = torch.rand(tokens, shape.experts, generator=generator, device=device)
    picked_TK, ids_TK = scores_TE.topk(shape.slots, dim=-1)
    return hidden_TD, ids_TK, (picked_TK / picked_TK.sum(dim=-1, keepdim=True)).float()


def error_of(config: ExpertsConfig, weights: ExpertWeights, call: Inputs) -> float:
    """Relative error of a config against the definition in float64, on a few of a call's tokens.

    Compilers err, too: a tile may be fast and wrong (docs/results/kernels-gpu.md).
    """
    tokens = len(call[0])
    some = torch.arange(0, tokens, -(-tokens // EXACT_TOKENS), device=call[0].device)
    hidden, ids, gates = (tensor[some] for tensor in call)
    computed = experts_gpu(*call, weights, config=config)[some].double()
    wanted = experts_reference(hidden.double(), ids, gates, weights)
    return float((computed - wanted).norm() / wanted.norm())


class _Compiled(ExpertsCall):
    """Compiles what a call would launch, into Triton's cache on disk."""

    def run(self, program: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        settle_keys()
        program.warmup(*arguments, grid=grid, **options)


def _compile(shape: Shape, tokens: int, config: ExpertsConfig, product: Product) -> None:
    """In a process of its own: the programs of one product."""
    torch.cuda.current_device()  # Triton asks the driver for what to compile
    call = _compiled_call(shape, tokens, config)
    blocks = _empty_blocks() if not config.is_direct else ()
    (call.first_product if product == FIRST else call.second_product)(*blocks)


def _empty_blocks() -> tuple[Tensor, Tensor, Tensor]:
    integers = torch.empty(8, dtype=torch.int32, device="meta")
    return integers, torch.empty(3, 8, dtype=torch.int32, device="meta"), integers


def _compiled_call(shape: Shape, tokens: int, config: ExpertsConfig) -> ExpertsCall:
    """A call without data, whose programs are compiled where another's are launched."""
    weights = random_weights(shape, "meta")
    dtype = torch.bfloat16 if weights.gate_up.dtype == FP8 else weights.gate_up.dtype
    hidden_TD = torch.empty(tokens, shape.hidden, dtype=dtype, device="meta")
    ids_TK = torch.empty(tokens, shape.slots, dtype=torch.int64, device="meta")
    gates_TK = torch.empty(tokens, shape.slots, device="meta")
    return _Compiled(hidden_TD, ids_TK, gates_TK, operands(weights), config)


class Tuner:
    """Tunes shapes one after the other; those to come are compiled meanwhile."""

    def __init__(
        self,
        shapes: Sequence[Shape],
        tokens: Sequence[int],
        progress: Progress,
        processes: int | None = None,
        most_error: float | None = None,
    ) -> None:
        """`processes` compile; as many as there are cores but one, where it is not said.

        `most_error` is how far off float64 a config may be, relative; else `MOST_ERROR`."""
        if not torch.cuda.is_available():
            raise LeanMoeError("kernels are tuned on a GPU, and torch finds none on this machine")
        self.shapes, self.tokens, self.progress = list(shapes), sorted(set(tokens)), progress
        self.failures: list[str] = []
        """What did not run or was too far off, each with the reason."""
        self._most_error = most_error
        self._processes = processes or max(1, (os.cpu_count() or 2) - 1)

    def tune(self) -> Iterator[TunedShape]:
        """Each shape, and for each number of tokens the best config and its microseconds."""
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(self._processes, mp_context=context) as pool:
            compiled = [self._compile(pool, shape) for shape in self.shapes]
            for shape, jobs in zip(self.shapes, compiled, strict=True):
                self._wait(shape, jobs)
                most_error = self._most_error or MOST_ERROR[shape.dtype]
                timed = _Timed(shape, self.failures, most_error)
                configs = []
                for number, size in enumerate(self.tokens):
                    self.progress(f"timing {shape}", number, len(self.tokens))
                    configs.append((size, *timed.best(size)))
                self.progress(f"timing {shape}", len(self.tokens), len(self.tokens))
                yield shape, configs

    def _compile(self, pool: ProcessPoolExecutor, shape: Shape) -> list[Future[None]]:
        """What is compiled depends on the tokens only in how exactly each slot's result is kept."""
        once = {
            (config, product, size > MOST_FLOAT32_TOKENS): (size, config, product)
            for size in self.tokens
            for base in base_configs(shape, size)
            for product, config in _candidates(base, shape)
        }
        return [pool.submit(_compile, shape, *job) for job in once.values()]

    def _wait(self, shape: Shape, jobs: list[Future[None]]) -> None:
        for number, job in enumerate(jobs):
            self.progress(f"compiling {shape}", number, len(jobs))
            if error := job.exception():
                self.failures.append(repr(error)[:300])
        self.progress(f"compiling {shape}", len(jobs), len(jobs))


def _candidates(base: ExpertsConfig, shape: Shape) -> list[tuple[Product, ExpertsConfig]]:
    """What is compiled ahead. The second product knows of the first its columns, if anything."""
    first = [_with(base, FIRST, tile) for tile in tiles(base, shape, True)]
    columns = {config.gate_up.BLOCK_N: config for config in first}
    before = columns.values() if is_fp8(shape) else [base]
    second = [_with(c, SECOND, tile) for c in before for tile in tiles(base, shape, False)]
    return [(FIRST, config) for config in first] + [(SECOND, config) for config in second]


class _Timed:
    """Times configs of one shape."""

    def __init__(self, shape: Shape, failures: list[str], most_error: float) -> None:
        self.shape, self.failures, self.most_error = shape, failures, most_error
        self.weights = random_weights(shape)

    def best(self, tokens: int) -> tuple[ExpertsConfig, float]:
        """The best config and its microseconds."""
        # Inputs differ, so that caches do not flatter; many tokens read all weights anyway.
        sets = 16 if tokens <= 8 else 4 if tokens <= 64 else 1
        inputs = [random_call(self.shape, tokens, seed) for seed in range(sets)]
        best: tuple[float, ExpertsConfig] | None = None
        for base in base_configs(self.shape, tokens):
            config = base
            for product in (FIRST, SECOND):
                tile = self._best_tile(config, product, inputs)
                if tile is None:
                    break
                config = _with(config, product, tile)
            else:
                took = self._time(config, inputs)
                if took is None or (best is not None and took >= best[0]):
                    continue
                if self._is_exact(config, inputs[0]):
                    best = (took, config)
        if best is None:
            reason = self.failures[-1] if self.failures else ""
            raise LeanMoeError(f"no config ran for {self.shape} at {tokens} tokens: {reason}")
        return best[1], best[0]

    def _is_exact(self, config: ExpertsConfig, call: Inputs) -> bool:
        error = error_of(config, self.weights, call)
        if error <= self.most_error:
            return True
        self.failures.append(f"{error:.1%} off float64, {self.most_error:.1%} is the most")
        return False

    def _best_tile(
        self, base: ExpertsConfig, product: Product, inputs: Sequence[Inputs]
    ) -> Tile | None:
        """A rough time for every tile, a careful one for the few that did best."""
        lists = [_grouped(base, ids, self.shape) for _, ids, _ in inputs]
        tiles_left = list(tiles(base, self.shape, product == FIRST))
        for is_rough in (True, False):
            times: list[tuple[float, int]] = []
            for number, tile in enumerate(tiles_left):
                config = _with(base, product, tile)

                def calls(config: ExpertsConfig = config) -> list[Callable[[], object]]:
                    layer, pairs = operands(self.weights), zip(inputs, lists, strict=True)
                    return [_product(ExpertsCall(*i, layer, config), product, b) for i, b in pairs]

                took = self._try(calls, is_rough)
                if took is not None:
                    times.append((took, number))
            tiles_left = [tiles_left[number] for _, number in sorted(times)[:FINALISTS]]
        return tiles_left[0] if tiles_left else None

    def _time(self, config: ExpertsConfig, inputs: Sequence[Inputs]) -> float | None:
        """The whole op, grouping of the ids and all."""

        def calls() -> list[Callable[[], object]]:
            return [partial(experts_gpu, *i, self.weights, config=config) for i in inputs]

        return self._try(calls)

    def _try(
        self, calls: Callable[[], list[Callable[[], object]]], is_rough: bool = False
    ) -> float | None:
        """Microseconds; None for what does not run: one tile that does not fit must not end it."""
        try:
            return time_calls(calls(), is_rough=is_rough)
        except Exception as error:
            self.failures.append(repr(error)[:300])
            return None


def _with(config: ExpertsConfig, product: Product, tile: Tile) -> ExpertsConfig:
    return replace(config, gate_up=tile) if product == FIRST else replace(config, down=tile)


def _grouped(base: ExpertsConfig, ids_TK: Tensor, shape: Shape) -> ExpertBlocks | None:
    return (
        None if base.is_direct else expert_blocks_reference(ids_TK, shape.experts, base.block_rows)
    )


def _product(
    call: ExpertsCall, product: Product, blocks: ExpertBlocks | None
) -> Callable[[], object]:
    run = call.first_product if product == FIRST else call.second_product
    return lambda: run(*(() if blocks is None else blocks[:3]))
