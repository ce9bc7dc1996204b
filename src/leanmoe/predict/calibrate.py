"""`leanmoe calibrate`: constants of the GPU at hand, from a few minutes of small measurements.

Layers of several shapes run leanmoe's experts on random hidden states and random experts, captured
in CUDA graphs; dense products of many shapes give the rates of the rest. Everything that takes time
goes through a `Clock`, so that all but the GPU itself can be tested without one.

Letters: T tokens, K slots a token, E experts, D hidden width, M expert width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from leanmoe.core.errors import LeanMoeError
from leanmoe.core.progress import bar
from leanmoe.core.provenance import collect
from leanmoe.predict.constants import ANY, Constants, KernelConstants, shipped
from leanmoe.predict.hardware.gpus import Gpu, Rates
from leanmoe.predict.kernels.features import ExpertsShape, Rows
from leanmoe.predict.kernels.fit import (
    Form,
    Reading,
    accuracy,
    errors_of,
    fit,
    fit_positive,
    log_error,
    stages,
)
from leanmoe.predict.settings import CALIBRATE_TOKENS

if TYPE_CHECKING:
    from torch import Tensor

KERNEL = "leanmoe"
DTYPE = "bfloat16"
LAYERS = ((64, 2048, 1024, 8), (128, 2048, 768, 8), (128, 4096, 1536, 8), (64, 2048, 1408, 6))
"""Experts, hidden width, expert width, slots. Every second one is fitted, so those differ in all
three; a model's own layer is added, if it fits."""
FEATURES = ("call", "weights", "products", "activations", "slots_hidden", "waves")
EDGES = (16, 256, ANY)
"""Fewer ranges and fewer constants than for the large tables: there are fewer readings."""
INPUTS = 4
"""Inputs of a graph, each with other experts, so that caches do not flatter."""
PRODUCTS = tuple(
    (m, n, k) for m in (1, 16, 128, 1024, 8192) for n, k in ((4096, 4096), (2048, 8192))
)
"""Rows, columns and depth of dense products."""
NEEDED = ("torch", "triton", "scipy")
"""Packages of leanmoe[gpu] that are missed too late otherwise: after everything was measured."""
MEMORY_SHARE = 0.5
"""Share of the GPU's memory that a layer's weights may take."""


class Clock(Protocol):
    """Seconds a call takes, of calls that do the same on other inputs."""

    def __call__(self, calls: Sequence[Callable[[], object]]) -> float:
        """Median seconds of one."""


def gpu_clock(calls: Sequence[Callable[[], object]]) -> float:
    """Captured in a CUDA graph, median of five replays."""
    from leanmoe.kernels.triton.timing import time_calls

    return time_calls(calls) * 1e-6


@dataclass(frozen=True)
class Layer:
    """A layer to measure."""

    experts: int
    hidden: int
    width: int
    slots: int

    @property
    def bytes(self) -> int:
        """Bytes of its weights in bf16."""
        return 3 * 2 * self.experts * self.hidden * self.width

    def shape(self) -> ExpertsShape:
        """The layer's sizes for the cost model."""
        return ExpertsShape(self.hidden, self.width, self.experts)


@dataclass(frozen=True)
class Sizes:
    """What is measured: layers at these numbers of tokens, and products of these shapes."""

    tokens: Sequence[int] = CALIBRATE_TOKENS
    products: Sequence[tuple[int, int, int]] = PRODUCTS


def calibrate(
    gpu: Gpu,
    layers: Sequence[Layer],
    output: Path,
    command: str,
    clock: Clock = gpu_clock,
    device: str = "cuda",
    sizes: Sizes = Sizes(),
) -> Constants:
    """Measures, fits every second layer, tests on the others, writes the constants.

    The file says how far off the test was. Raises LeanMoeError without a GPU, and where fewer than
    two layers fit its memory.
    """
    require_gpu(device)
    fitting = [layer for layer in layers if layer.bytes <= gpu.memory * MEMORY_SHARE]
    if len(fitting) < 2:
        raise LeanMoeError(
            f"{len(fitting)} layers fit half of {gpu.name}'s {gpu.memory / 1e9:.0f} GB: at least "
            "2 are needed, one to fit and one to test"
        )
    readings = {
        layer: measure_layer(layer, sizes.tokens, clock, device) for layer in dict.fromkeys(fitting)
    }
    kernel = fit_readings(gpu, readings)
    rates = fit_rates(gpu, measure_products(sizes.products, clock, device))
    made = {**collect(command).to_json(), "label": "measured", "gpu": gpu.name}
    constants = Constants((kernel,), {gpu.name: rates}, made)
    constants.save(output)
    return constants


def require_gpu(device: str) -> None:
    """Raises LeanMoeError where there is no GPU to measure, or no package to fit with."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise LeanMoeError(
            f"leanmoe calibrate needs {' and '.join(missing)}: pip install 'leanmoe[gpu]'"
        )
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise LeanMoeError(
            "leanmoe calibrate needs an NVIDIA GPU that torch can use; without one, leanmoe "
            "predict uses the constants that come with it"
        )


def gpu_at_hand(described: Gpu) -> Gpu:
    """The description, with what torch says of memory and multiprocessors of the GPU in use."""
    import torch

    device = torch.cuda.get_device_properties(0)
    return replace(
        described,
        memory=float(device.total_memory),
        multiprocessors=int(device.multi_processor_count),
    )


def measure_layer(layer: Layer, tokens: Sequence[int], clock: Clock, device: str) -> list[Reading]:
    """A layer's experts at each number of tokens; experts are chosen evenly."""
    import torch

    from leanmoe.kernels import experts_gpu
    from leanmoe.kernels.triton.tune_tiles import random_weights
    from leanmoe.kernels.triton.tuned_tiles import Shape

    shape = Shape(layer.experts, layer.hidden, layer.width, layer.slots, DTYPE)
    weights = random_weights(shape, device)
    readings = []
    name = f"{layer.experts} x {layer.hidden} x {layer.width}"
    with bar(f"Experts {name}", len(tokens), "sizes") as advance:
        for count in tokens:
            inputs = [_draw(layer, count, seed, device) for seed in range(INPUTS)]
            calls = [partial(experts_gpu, *each, weights) for each in inputs]
            seconds = clock(calls)
            readings.append(Reading(layer.shape(), _rows(layer, count, inputs), seconds))
            advance(1)
    del weights
    if device == "cuda":
        torch.cuda.empty_cache()
    return readings


def _draw(layer: Layer, tokens: int, seed: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    import torch

    draw = torch.Generator().manual_seed(seed)
    hidden_TD = torch.randn(tokens, layer.hidden, generator=draw).to(device, torch.bfloat16)
    score_TE = torch.rand(tokens, layer.experts, generator=draw)
    ids_TK = score_TE.topk(layer.slots).indices.to(device)
    weights_TK = torch.full((tokens, layer.slots), 1 / layer.slots, device=device)
    return hidden_TD, ids_TK, weights_TK


def _rows(layer: Layer, tokens: int, inputs: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Rows:
    distinct = float(np.mean([len(np.unique(ids_TK.cpu().numpy())) for _, ids_TK, _ in inputs]))
    return Rows(tokens, layer.slots, tokens * layer.slots, distinct)


def fit_readings(gpu: Gpu, readings: dict[Layer, list[Reading]]) -> KernelConstants:
    """Constants from every second layer, tested on the others."""
    layers = list(readings)
    fitted = [r for layer in layers[::2] for r in readings[layer]]
    unseen = [r for layer in layers[1::2] for r in readings[layer]]
    constants = fit(
        KERNEL,
        gpu,
        DTYPE,
        fitted,
        f"leanmoe calibrate on {gpu.name}, {len(layers[::2])} layers",
        stages(EDGES),
        Form(FEATURES),
    )
    off = accuracy("layers not fitted", errors_of(constants, unseen, gpu))
    return replace(constants, accuracy=(off,))


def measure_products(
    products: Sequence[tuple[int, int, int]], clock: Clock, device: str
) -> list[tuple[int, int, int, float]]:
    """Seconds of dense bf16 products, (rows, columns, depth, seconds)."""
    import torch

    times = []
    with bar("Dense products", len(products), "shapes") as advance:
        for m, n, k in products:
            left = torch.randn(m, k, device=device).to(torch.bfloat16)
            rights = [torch.randn(k, n, device=device).to(torch.bfloat16) for _ in range(INPUTS)]
            times.append((m, n, k, clock([partial(torch.matmul, left, right) for right in rights])))
            advance(1)
    return times


def fit_rates(gpu: Gpu, products: Sequence[tuple[int, int, int, float]]) -> Rates:
    """Rates of dense products as measured; attention and communication as shipped."""
    m, n, k, took = (np.array(column, dtype=float) for column in zip(*products, strict=True))
    moved = 2.0 * (n * k + m * (n + k))
    work = 2 * m * n * k

    def predict(constants: NDArray[np.float64]) -> NDArray[np.float64]:
        bandwidth, flops, call = constants
        longer = np.maximum(moved / gpu.bandwidth / bandwidth, work / gpu.flops / flops)
        return np.asarray(call * 1e-6 + longer)

    constants = fit_positive(predict, took, (0.7, 0.6, 3.0))
    off = log_error(predict(constants), took)
    bandwidth, flops, call = (float(f"{value:.4g}") for value in constants)
    rest, origin = shipped().rates_for(gpu.name)
    return replace(
        rest,
        product_bandwidth=bandwidth,
        product_flops=flops,
        product_seconds=call * 1e-6,
        fitted_to=f"dense products measured on {gpu.name} (off by {off:.0%} on average); "
        f"attention and communication: {origin}",
    )
