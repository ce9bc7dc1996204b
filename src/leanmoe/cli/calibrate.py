"""`leanmoe calibrate`: constants of this machine's GPU for `leanmoe predict`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from leanmoe.cli.options import AsJson, Overwrite, print_json
from leanmoe.cli.verb import command_line
from leanmoe.core.errors import LeanMoeError
from leanmoe.predict.settings import CalibrateSettings


def calibrate(
    settings: CalibrateSettings,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The file of constants to write.")
    ] = Path("constants.json"),
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Measure how fast this GPU runs experts and products, and fit constants to it.

    Needs an NVIDIA GPU.

    Example:
    leanmoe calibrate h200 --model Qwen/Qwen3-30B-A3B -o h200.json
    """
    from leanmoe.models.catalog import find_shape
    from leanmoe.predict.calibrate import LAYERS, Layer, Sizes, gpu_at_hand, require_gpu
    from leanmoe.predict.calibrate import calibrate as run
    from leanmoe.predict.hardware.gpus import read_gpu

    described = read_gpu(settings.gpu)
    layers = [Layer(*widths) for widths in LAYERS]
    for name in settings.model:
        shape = find_shape(name)
        layers.append(Layer(shape.experts, shape.hidden, shape.expert_width, shape.top_k))
    if output.exists() and not overwrite:
        raise LeanMoeError(f"{output} exists: choose another --output, or add --overwrite")
    require_gpu("cuda")
    sizes = Sizes(sorted(set(settings.tokens)))
    constants = run(gpu_at_hand(described), layers, output, command_line(), sizes=sizes)
    kernel = constants.kernels[0]
    if as_json:
        print_json({"output": str(output), "label": "measured", **asdict(kernel)})
        return
    for each in kernel.accuracy:
        print(f"{kernel.kernel} {kernel.dtype} on {kernel.gpu}: {each}")
    print(f"{output}; to use it: leanmoe predict MODEL --constants {output} --kernel leanmoe")
