"""leanmoe's own kernel: constants from our readings, tested on others. Part of `fit`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from leanmoe.core.files import read_json
from leanmoe.models.shape import distinct_uniform
from leanmoe.predict.constants import ANY, KernelConstants
from leanmoe.predict.hardware.gpus import Gpu
from leanmoe.predict.kernels.features import ExpertsShape, Rows
from leanmoe.predict.kernels.fit import Form, Reading, accuracy, errors_of, fit, stages
from leanmoe.predict.kernels.tables import ACTIVATION_BYTES, WEIGHT_BYTES

OUR_LAYER = {1: 165.5, 8: 1075, 16: 1910, 32: 3036, 64: 4280, 128: 4795, 256: 4946}
"""Microseconds of leanmoe's kernel on one DeepSeek-V3 layer (7168, 2048, 256 experts, k = 8, bf16,
random draws) by tokens, on one H200, 2026-11-24 (docs/results/kernels-gpu.md)."""
OUR_FIT = (1, 16, 64, 256)
"""Points of those that constants are fitted to; the others are a test."""
OUR_FEATURES = ("call", "weights")
OUR_MANY_FEATURES = ("call", "weights", "products", "longer", "activations", "waves")
OUR_FEW_FEATURES = ("call", "weights", "products")
"""Of one shape alone; more would be fitted to its noise."""
OUR_EDGES = (256, ANY)


def our_kernel(gpu: Gpu) -> tuple[KernelConstants, list[dict[str, float]]]:
    """leanmoe's own kernel from our own readings, and its error at each."""
    shape = ExpertsShape(7168, 2048, 256)

    def at(tokens: int) -> Reading:
        distinct = distinct_uniform(256, 8, tokens)
        return Reading(shape, Rows(tokens, 8, tokens * 8, distinct), OUR_LAYER[tokens] * 1e-6)

    constants = fit(
        "leanmoe",
        gpu,
        "bfloat16",
        [at(n) for n in OUR_FIT],
        "four of seven readings of one DeepSeek-V3 layer, docs/results/kernels-gpu.md, h200",
        stages((ANY,)),
        Form(OUR_FEATURES),
    )
    readings = [at(n) for n in OUR_LAYER]
    errors = errors_of(constants, readings, gpu)
    unseen = np.array([e for n, e in zip(OUR_LAYER, errors, strict=True) if n not in OUR_FIT])
    off = accuracy("our readings at tokens not fitted", unseen)
    constants = replace(constants, accuracy=(off,))
    lines = [
        {
            "tokens": n,
            "microseconds": OUR_LAYER[n],
            "predicted": round(OUR_LAYER[n] * (1 + e), 1),
            "error": float(f"{e:.4g}"),
            "fitted": n in OUR_FIT,
        }
        for n, e in zip(OUR_LAYER, errors, strict=True)
    ]
    return constants, lines


def beyond(ours: KernelConstants, others: Sequence[KernelConstants]) -> KernelConstants:
    """The readings end at 256 tokens; what is longer is carried over from the other GPU's rows."""
    same = next((each for each in others if each.dtype == ours.dtype), None)
    if same is None:
        return ours
    longer = tuple(r for r in same.regimes if r.up_to > OUR_EDGES[0])
    regimes = (replace(ours.regimes[0], up_to=OUR_EDGES[0]), *longer)
    words = f"{ours.fitted_to}; beyond {OUR_EDGES[0]} tokens {same.gpu}'s constants"
    return replace(ours, regimes=regimes, fitted_to=words)


def our_benchmark(gpu: Gpu, folder: Path) -> tuple[list[KernelConstants], list[dict[str, Any]]]:
    """leanmoe's kernel from committed results of `kernels.experts_gpu` on that GPU.

    Constants are fitted to the full model's rows (k = 8) alone; the test is what a plan makes of
    them: k = 6, k = 4 and guaranteed = 3. fp8 has rows of the full model and of one shape alone:
    every second number of tokens is the test there.
    """
    rows = [
        row for path in sorted(folder.glob("*-experts-gpu.json")) for row in _our_rows(path, gpu)
    ]
    kernels, lines = [], []
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        mine = [row for row in rows if row["dtype"] == dtype]
        names: tuple[str, ...] = OUR_MANY_FEATURES
        edges: tuple[float, ...] = OUR_EDGES
        if all(row["rule"] == "k=8" for row in mine):
            held = set(sorted({row["tokens"] for row in mine})[1:-1:2])
            names, edges = OUR_FEW_FEATURES, OUR_EDGES[-1:]
            fitted = [row for row in mine if row["tokens"] not in held]
        else:
            fitted = [row for row in mine if row["rule"] == "k=8"]
        tested = [row for row in mine if row not in fitted]
        found = fit(
            "leanmoe",
            gpu,
            dtype,
            [row["reading"] for row in fitted],
            f"the full model's rows of leanmoe's benchmark on {gpu.name} (benchmarks/results)",
            stages(edges),
            Form(names),
        )
        groups = {
            "plans and tokens not fitted, to 256 tokens": [r for r in tested if r["tokens"] <= 256],
            "plans and tokens not fitted, 4,096 tokens": [r for r in tested if r["tokens"] > 256],
        }
        off = tuple(
            accuracy(what, errors_of(found, [row["reading"] for row in group], gpu))
            for what, group in groups.items()
            if group
        )
        kernels.append(replace(found, accuracy=off))
        lines += [{"dtype": dtype, "gpu": gpu.name, **vars(each)} for each in off]
    return kernels, lines


def _our_rows(path: Path, gpu: Gpu) -> Iterator[dict[str, Any]]:
    found = read_json(path, "results")
    if gpu.name not in found["provenance"]["hardware"].lower():
        return
    for line in [*found["lines"], *found["rules"]]:
        experts, hidden, rest = line["shape"].split(" x ")
        width, dtype = rest.split(" ")
        name = "fp8_block" if "float8" in dtype else dtype
        shape = ExpertsShape(
            int(hidden),
            int(width),
            int(experts),
            weight_bytes=WEIGHT_BYTES[name],
            activation_bytes=ACTIVATION_BYTES.get(name, 2.0),
        )
        tokens = line["tokens"]
        rows = Rows(tokens, line["rows"] / tokens, line["rows"], line["distinct"])
        yield {
            "dtype": name,
            "rule": line["rule"],
            "tokens": tokens,
            "reading": Reading(shape, rows, line["microseconds"]["leanmoe"] * 1e-6),
        }
