"""`leanmoe calibrate`: constants of this machine's GPU for `leanmoe predict`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from leanmoe.core.errors import LeanMoeError


def calibrate(
    gpu: Annotated[str, typer.Argument(help="This GPU by name, or a JSON file that says it.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file of constants.")] = Path(
        "constants.json"
    ),
    model: Annotated[
        list[str] | None, typer.Option(help="Models whose layers to measure, too; repeatable.")
    ] = None,
    tokens: Annotated[
        str, typer.Option(help="Tokens of a step to measure at; fewer take less time.")
    ] = "1,2,4,8,16,32,64,128,256,512,1024,2048,4096",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead.")] = False,
) -> None:
    """Measure how fast this GPU runs experts and products, and fit constants to it.

    Needs an NVIDIA GPU.

    Example:
    leanmoe calibrate h200 --model Qwen/Qwen3-30B-A3B -o h200.json
    """
    from leanmoe.models.catalog import find_shape
    from leanmoe.predict.calibrate import LAYERS, Layer, gpu_at_hand, read_tokens, require_gpu
    from leanmoe.predict.calibrate import calibrate as run
    from leanmoe.predict.hardware.gpus import read_gpu

    described = read_gpu(gpu)
    layers = [Layer(*widths) for widths in LAYERS]
    for name in model or []:
        shape = find_shape(name)
        layers.append(Layer(shape.experts, shape.hidden, shape.expert_width, shape.top_k))
    if output.exists():
        raise LeanMoeError(f"{output} is there already: give another --output, or remove it")
    sizes = read_tokens(tokens)
    require_gpu("cuda")
    command = " ".join(["leanmoe", *sys.argv[1:]])
    constants = run(gpu_at_hand(described), layers, output, command, tokens=sizes)
    kernel = constants.kernels[0]
    if as_json:
        print(json.dumps({"output": str(output), "label": "measured", **asdict(kernel)}))
        return
    for each in kernel.accuracy:
        print(f"{kernel.kernel} {kernel.dtype} on {kernel.gpu}: {each}")
    print(f"{output}; to use it: leanmoe predict MODEL --constants {output} --kernel leanmoe")
