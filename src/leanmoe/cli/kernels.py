"""`leanmoe kernels`: find the fastest way to run the GPU kernels for a shape, or list those known.

A GPU is needed to tune, none to list.
"""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from leanmoe.core.errors import LeanMoeError
from leanmoe.core.files import write_json
from leanmoe.core.parsing import parse_counts, require
from leanmoe.core.progress import bar
from leanmoe.core.provenance import collect

if TYPE_CHECKING:
    from leanmoe.kernels.triton.tuned_tiles import Shape, Tuned

TOKENS = "1,4,8,16,32,64,128,256,512,1024,2048,4096"
DTYPES = ("bfloat16", "float16", "float32", "float8_e4m3fn")
TRANSPOSED = ("gpt_oss",)
"""Model types whose experts lie as (E,D,2M) and (E,M,D) in Transformers."""


class Action(StrEnum):
    """What to do."""

    tune = "tune"
    list = "list"


def kernels(
    action: Annotated[Action, typer.Argument(help="'tune' for this GPU, or 'list' what there is.")],
    models: Annotated[
        list[str] | None,
        typer.Argument(help="Folders, config.json files, hub names, or 'reference'."),
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(help="experts,hidden,width,slots in place of a model; may be repeated."),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Of the weights: bfloat16, float16, float32 or float8_e4m3fn.")
    ] = "bfloat16",
    transposed: Annotated[
        bool, typer.Option("--transposed", help="Weights of --shape lie as gpt-oss has them.")
    ] = False,
    tokens: Annotated[
        str,
        typer.Option(
            help="Tokens in a step to tune for, comma separated.",
            show_default=TOKENS.replace(",", ", "),
        ),
    ] = TOKENS,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder; LEANMOE_TUNED tells leanmoe of it.")
    ] = Path("tuned"),
    trials: Annotated[
        Path | None, typer.Option(help="Write every config tried and its time to this file.")
    ] = None,
    most_error: Annotated[
        float | None,
        typer.Option(
            help="How far off float64 a tile may be, relative: 0.04 for fp8 weights, 0.01 for "
            "half precision, unless you say otherwise."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead.")] = False,
) -> None:
    """Find the fastest tiles of the GPU kernels for a model's experts, or list what is known.

    Example:
    leanmoe kernels tune deepseek-ai/DeepSeek-V3 --dtype float8_e4m3fn -o tuned
    """
    if action is Action.list:
        if asked := [*(models or []), *(shape or [])]:
            raise LeanMoeError(f"list takes no shape, it shows all: leave out {', '.join(asked)}")
        _list(output, as_json)
        return
    if dtype not in DTYPES:
        raise LeanMoeError(f"--dtype is {dtype!r}: it must be one of {', '.join(DTYPES)}")
    if most_error is not None and not 0 < most_error < 1:
        raise LeanMoeError(f"--most-error is {most_error:g}: it must be between 0 and 1")
    sizes = list(parse_counts("--tokens", tokens))
    shapes = [_of_model(name, dtype) for name in models or []]
    shapes += [_of_text(text, dtype, transposed) for text in shape or []]
    if not shapes:
        raise LeanMoeError("nothing to tune: name a model, or give --shape")
    _tune(shapes, sizes, output, trials, most_error, as_json)


def _of_model(name: str, dtype: str) -> Shape:
    from leanmoe.kernels.triton.tuned_tiles import Shape
    from leanmoe.models.catalog import find_shape

    found = find_shape(name)
    transposed = found.model_type in TRANSPOSED
    sizes = (found.experts, found.hidden, found.expert_width, found.top_k)
    return Shape(*sizes, dtype, transposed)


def _of_text(text: str, dtype: str, transposed: bool) -> Shape:
    from leanmoe.kernels.triton.tuned_tiles import Shape

    sizes = parse_counts("--shape", text)
    require(len(sizes) == 4, "--shape", repr(text), "4 numbers: experts,hidden,width,slots")
    experts, hidden, width, slots = sizes
    if slots > experts:
        raise LeanMoeError(f"--shape is {text!r}: {slots} slots are more than {experts} experts")
    return Shape(experts, hidden, width, slots, dtype, transposed)


def _tune(
    shapes: list[Shape],
    sizes: list[int],
    output: Path,
    trials: Path | None,
    most_error: float | None,
    as_json: bool,
) -> None:
    from leanmoe.kernels.triton.tune_tiles import Tuner
    from leanmoe.kernels.triton.tuned_tiles import Tuned, capability_of, file_name

    progress = _Progress()
    written: list[dict[str, Any]] = []
    tuner = Tuner(shapes, sizes, progress, most_error=most_error)
    for shape, found in tuner.tune():
        provenance = collect("leanmoe " + " ".join(sys.argv[1:])).to_json()
        buckets = tuple((size, config) for size, config, _ in found)
        times = {str(size): round(took, 2) for size, _, took in found}
        gpu = provenance["hardware"]
        measured = {**provenance, "microseconds": times}
        tuned = Tuned(gpu, capability_of(), shape, buckets, measured)
        path = output / file_name(gpu, shape)
        write_json(path, tuned.to_json())
        written.append({"file": str(path), "shape": shape.__dict__, "microseconds": times})
        if trials is not None:
            write_json(trials, {"label": "measured", "trials": tuner.trials})
    progress.close()
    if as_json:
        failed = sum("failed" in trial for trial in tuner.trials)
        print(json.dumps({"written": written, "label": "measured", "failed_trials": failed}))
        return
    for entry in written:
        print(entry["file"])
    print(f"To use them: export LEANMOE_TUNED={output}")


class _Progress:
    """A bar for each stage, one after the other."""

    def __init__(self) -> None:
        self._stage, self._done = "", 0
        self._bar: Any = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage != self._stage:
            self.close()
            self._stage, self._done = stage, 0
            self._bar = bar(stage, total)
            self._advance = self._bar.__enter__()
        self._advance(done - self._done)
        self._done = done

    def close(self) -> None:
        if self._bar is not None:
            self._bar.__exit__(None, None, None)
            self._bar = None


def _list(output: Path, as_json: bool) -> None:
    from leanmoe.kernels.triton.tuned_tiles import SHIPPED, Tuned

    folders = {"shipped": SHIPPED, str(output): output}
    found = [
        (name, path, Tuned.load(path))
        for name, folder in folders.items()
        for path in sorted(folder.glob("*.json"))
    ]
    if as_json:
        print(json.dumps([{"from": name, **tuned.to_json()} for name, _, tuned in found]))
        return
    console = Console(highlight=False)
    for gpu in dict.fromkeys(tuned.gpu for _, _, tuned in found):
        table = Table(box=SIMPLE_HEAD, pad_edge=False, title=gpu, title_justify="left")
        for heading in ("experts", "hidden", "width", "slots"):
            table.add_column(heading, justify="right")
        for heading in ("dtype", "tokens", "from"):
            table.add_column(heading)
        for name, _, tuned in found:
            if tuned.gpu == gpu:
                table.add_row(*_row(tuned), name)
        console.print(table)


def _row(tuned: Tuned) -> list[str]:
    shape = tuned.shape
    dtype = f"{shape.dtype}, transposed" if shape.is_transposed else shape.dtype
    sizes = [shape.experts, shape.hidden, shape.width, shape.slots]
    return [*map(str, sizes), dtype, f"{tuned.buckets[0][0]} to {tuned.buckets[-1][0]}"]
