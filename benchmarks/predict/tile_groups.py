"""One kernel and format of AIConfigurator's tables: halves, fit, test. Part of `fit`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.predict.kernel_forms import TUNED, choose, schedule_of
from benchmarks.predict.table_noise import BEATEN, noise, times_beaten
from leanmoe.core.files import read_json
from leanmoe.predict.constants import Accuracy, KernelConstants, TunedLayer
from leanmoe.predict.hardware.gpus import Gpu
from leanmoe.predict.kernels.fit import Reading, accuracy, errors_of, fit
from leanmoe.predict.kernels.tables import PACKAGE, UNGATED, VERSION, Measured, Table, read_table
from leanmoe.predict.step.experts_time import Ratios

LEAST_EXPERTS, LEAST_SLOTS, MOST_SLOTS, MOST_GPUS = 64, 4, 10, 16
UNSEEN_K = 6
TILES = Path(__file__).parent / "data" / "tiles"
SEEN = ("unseen half", "every k = 6 row")
"""What is said of constants wherever they are used."""


def in_domain(row: Measured, table: Table) -> bool:
    """Whether a row is of fine-grained experts as a GPU would serve them."""
    if table.dtype == "w4a16_mxfp4":  # gpt-oss alone: 2880 wide, in no multiple of 128
        return row.tensor * row.expert <= MOST_GPUS and row.experts >= LEAST_EXPERTS
    return (
        row.shape(table.dtype).is_as_tested
        and row.experts >= LEAST_EXPERTS
        and LEAST_SLOTS <= row.top_k <= MOST_SLOTS
        and row.tensor * row.expert <= MOST_GPUS
        and (row.hidden, row.width) not in UNGATED
    )


def reading(row: Measured, table: Table) -> Reading:
    """A row as the fit takes it."""
    return Reading(row.shape(table.dtype), row.rows(table.kernel), row.seconds)


def halves(rows: Sequence[Measured], seed: int) -> tuple[set[Any], set[Any]]:
    """Keys of shapes to fit and to test; those with k = 6 are in neither."""
    keys = sorted({row.key for row in rows if row.top_k != UNSEEN_K})
    order = np.random.default_rng(seed).permutation(len(keys))
    half = {keys[n] for n in order[: len(keys) // 2]}
    return half, set(keys) - half


def tuned_layers(table: Table, gpu: Gpu) -> tuple[TunedLayer, ...]:
    """Tiles of the layers that the kernel's engine has tuned on that GPU."""
    every = [
        layer
        for path in sorted(TILES.glob("*.json"))
        for layer in read_json(path, "tiles")["layers"]
        if (layer["kernel"], layer["dtype"], layer["gpu"]) == (table.kernel, table.dtype, gpu.name)
    ]
    return tuple(TunedLayer(each["experts"], each["width"], each["tiles"]) for each in every)


def scored_groups(
    rows: Sequence[Measured], fitted: Container[Any], tested: Container[Any]
) -> dict[str, list[Measured]]:
    """The rows that are scored on their own; `fitted` and `tested` hold keys of shapes."""
    steady = {id(r) for r, beaten in zip(rows, times_beaten(rows), strict=True) if beaten <= BEATEN}
    unseen = [r for r in rows if r.key in tested]
    return {
        "fitted": [r for r in rows if r.key in fitted],
        "unseen half": unseen,
        "every k = 6 row": [r for r in rows if r.top_k == UNSEEN_K],
        "decode of the unseen half, to 512 tokens": [r for r in unseen if r.tokens <= 512],
        "unseen half, not contradicted": [r for r in unseen if id(r) in steady],
    }


def fit_table(gpu: Gpu, table: Table, seed: int) -> tuple[KernelConstants, dict[str, Any]]:
    """Constants of a kernel, and the row of the results that says how far off they are.

    Rows are scored twice: all, and without those that the table itself contradicts twofold. These
    are left out of the fit where rows of the fitted half alone contradict them.
    """
    every = [r for r in read_table(gpu.name, table) if not r.is_grouped(table.kernel)]
    rows = [row for row in every if in_domain(row, table)]
    fitted, tested = halves(rows, seed)
    mine = [row for row in rows if row.key in fitted]
    mine = [row for row, beaten in zip(mine, times_beaten(mine), strict=True) if beaten <= BEATEN]
    readings = [reading(row, table) for row in mine]
    tuned = tuned_layers(table, gpu)
    stages = (*(TUNED if tuned else ()), *schedule_of(table.kernel, table.dtype))
    named = (table.kernel, gpu, table.dtype, readings)
    form = choose(*named, stages, tuned)
    words = f"half of the shapes of {table.source}, {PACKAGE} {VERSION}, {gpu.name}"
    constants = fit(*named, words, stages, form)
    groups = scored_groups(rows, fitted, tested)
    groups["outside the domain"] = [r for r in every if not in_domain(r, table)]
    found, worst = [], {}
    for name, group in groups.items():
        if group:
            errors = errors_of(constants, [reading(r, table) for r in group], gpu)
            found.append(accuracy(name, errors))
            worst[name] = _worst(group, errors)
    held = interpolated(constants, gpu, table, rows)
    seen = [a for a in found if a.what in SEEN]
    constants = replace(constants, accuracy=(*seen, *held))
    line = {
        "kernel": table.kernel,
        "dtype": table.dtype,
        "gpu": gpu.name,
        "shapes": {"fitted": len(fitted), "tested": len(tested)},
        "form": {
            "features": list(form.names),
            "features of tuned layers": list(form.tuned_names) if tuned else [],
            "least waves": form.least_waves,
        },
        "accuracy": [vars(a) for a in found],
        "interpolated": {each.what: vars(each) for each in held},
        "noise of the table": noise(rows),
        "worst": worst,
        "grouped": _grouped(constants, gpu, table),
    }
    return constants, line


def _worst(rows: Sequence[Measured], errors: NDArray[np.float64]) -> dict[str, Any]:
    place = int(np.abs(errors).argmax())
    row = rows[place]
    return {
        "shape": list(row.key),
        "tokens": row.tokens,
        "error": float(f"{errors[place]:.4g}"),
    }


def interpolated(
    constants: KernelConstants, gpu: Gpu, table: Table, rows: Sequence[Measured]
) -> list[Accuracy]:
    """How far off is the model held to measured rows of the very layer, on rows it is not held to?

    Each row is predicted from its layer's other rows; and each with k = 6 from the rows of
    the same layer with k = 8: what a plan of a measured layer is predicted from.
    """
    curves: dict[tuple[int, ...], dict[int, float]] = defaultdict(dict)
    for row in rows:
        one = reading(row, table)
        modelled = constants.seconds(one.shape, one.rows, gpu)
        curves[row.key][row.tokens] = row.seconds / modelled
    left_out, from_full = [], []
    for key, curve in curves.items():
        points = sorted(curve)
        for tokens in points[1:-1]:
            others = Ratios.of((n, curve[n]) for n in points if n != tokens)
            left_out.append(others.at(tokens) / curve[tokens] - 1)
        full = curves.get((*key[:3], 8, *key[4:]))
        if key[3] == UNSEEN_K and full is not None:
            held = Ratios.of(full.items())
            from_full += [held.at(tokens) / ratio - 1 for tokens, ratio in curve.items()]
    found = {"each row from its layer's others": left_out, "k = 6 from k = 8 rows": from_full}
    return [
        replace(accuracy(what, np.array(errors)), is_interpolated=True)
        for what, errors in found.items()
        if errors
    ]


def _grouped(constants: KernelConstants, gpu: Gpu, table: Table) -> Mapping[str, Any] | None:
    """DeepSeek-V3's rows where the collector's router limited groups: as published, and as run."""
    rows = [r for r in read_table(gpu.name, table) if r.is_grouped(table.kernel)]
    rows = [r for r in rows if in_domain(r, table) and r.tokens >= 32]
    if not rows:
        return None
    as_run = errors_of(constants, [reading(r, table) for r in rows], gpu)
    plain = [Reading(r.shape(table.dtype), r.rows("trtllm"), r.seconds) for r in rows]
    published = errors_of(constants, plain, gpu)
    return {
        "as published": vars(accuracy("every expert can be active", published)),
        "as run": vars(accuracy("4 of 8 groups", as_run)),
    }


def transfer(constants: KernelConstants, table: Table, gpu: Gpu) -> dict[str, Any]:
    """How far off one GPU's constants are on another GPU."""
    rows = [r for r in read_table(gpu.name, table) if not r.is_grouped(table.kernel)]
    readings = [reading(r, table) for r in rows if in_domain(r, table)]
    errors = errors_of(constants.borrowed(), readings, gpu)
    found = accuracy(f"{constants.gpu}'s constants on {gpu.name}", errors)
    return {"kernel": table.kernel, "dtype": table.dtype, **vars(found)}
