"""`leanmoe kernels`: find the fastest way to run the GPU kernels for a shape, or list those known.

A GPU is needed to tune, none to list.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from leanmoe.cli.kernels_settings import KernelsSettings
from leanmoe.cli.options import AsJson, make_console, print_json
from leanmoe.cli.verb import command_line
from leanmoe.core.progress import bar
from leanmoe.core.provenance import collect

if TYPE_CHECKING:
    from leanmoe.kernels.triton.tuned_tiles import Shape, Tuned

TRANSPOSED = ("gpt_oss",)
"""Model types whose experts lie as (E,D,2M) and (E,M,D) in Transformers."""


def kernels(
    settings: KernelsSettings,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="A folder; LEANMOE_TUNED tells leanmoe of it."),
    ] = Path("tuned"),
    as_json: AsJson = False,
) -> None:
    """Find the fastest tiles of the GPU kernels for a model's experts, or list what is known.

    Example:
    leanmoe kernels tune deepseek-ai/DeepSeek-V3 --dtype float8_e4m3fn -o tuned
    """
    if settings.action == "list":
        _list(output, as_json)
    else:
        _tune(settings, output, as_json)


def _shapes(settings: KernelsSettings) -> list[Shape]:
    """The shapes of the models that are named, then those that are given as numbers."""
    from leanmoe.kernels.triton.tuned_tiles import Shape

    dtype, transposed = settings.dtype, settings.transposed
    given = [Shape(*sizes, dtype, transposed) for sizes in settings.shape]
    return [_of_model(name, dtype) for name in settings.models] + given


def _of_model(name: str, dtype: str) -> Shape:
    from leanmoe.kernels.triton.tuned_tiles import Shape
    from leanmoe.models.catalog import find_shape

    shape = find_shape(name)
    transposed = shape.model_type in TRANSPOSED
    sizes = (shape.experts, shape.hidden, shape.expert_width, shape.top_k)
    return Shape(*sizes, dtype, transposed)


def _tune(settings: KernelsSettings, output: Path, as_json: bool) -> None:
    shapes = _shapes(settings)
    from leanmoe.kernels.triton.tune_tiles import Tuner
    from leanmoe.kernels.triton.tuned_tiles import Bucket, Tuned, capability_of, file_name

    progress = _Progress()
    written: list[dict[str, Any]] = []
    tuner = Tuner(shapes, list(settings.tokens), progress, most_error=settings.most_error)
    for shape, tiles in tuner.tune():
        provenance = collect(command_line()).to_json()
        buckets = tuple(Bucket(size, config) for size, config, _ in tiles)
        times = {str(size): round(took, 2) for size, _, took in tiles}
        gpu = provenance["hardware"]
        measured = {**provenance, "microseconds": times}
        tuned = Tuned(gpu, capability_of(), shape, buckets, measured)
        path = output / file_name(gpu, shape)
        tuned.save(path)
        written.append({"file": str(path), "shape": shape.__dict__, "microseconds": times})
    progress.close()
    if as_json:
        failed = len(tuner.failures)
        print_json({"written": written, "label": "measured", "failed_trials": failed})
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
    known = [
        (name, path, Tuned.load(path))
        for name, folder in folders.items()
        for path in sorted(folder.glob("*.json"))
    ]
    if as_json:
        print_json([{"from": name, **tuned.to_json()} for name, _, tuned in known])
        return
    console = make_console()
    for gpu in dict.fromkeys(tuned.gpu for _, _, tuned in known):
        table = Table(box=SIMPLE_HEAD, pad_edge=False, title=gpu, title_justify="left")
        for heading in ("experts", "hidden", "width", "slots"):
            table.add_column(heading, justify="right")
        for heading in ("dtype", "tokens", "from"):
            table.add_column(heading)
        for name, _, tuned in known:
            if tuned.gpu == gpu:
                table.add_row(*_row(tuned), name)
        console.print(table)


def _row(tuned: Tuned) -> list[str]:
    shape = tuned.shape
    dtype = f"{shape.dtype}, transposed" if shape.is_transposed else shape.dtype
    sizes = [shape.experts, shape.hidden, shape.width, shape.slots]
    return [*map(str, sizes), dtype, f"{tuned.buckets[0].tokens} to {tuned.buckets[-1].tokens}"]
