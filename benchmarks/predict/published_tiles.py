"""Which tiles do vLLM and SGLang name for layers that they have tuned?

    pip download --no-deps vllm==0.24.0 sglang==0.5.14
    python -m benchmarks.predict.published_tiles vllm-0.24.0-*.whl sglang-0.5.14-*.whl

Reads the rows and columns of a tile, by tokens, from the configurations of the fused MoE kernel in
the wheels (both Apache-2.0) and writes them to data/tiles/ENGINE-VERSION.json beside this, which
`fit` reads. An engine takes the configuration whose tokens are nearest; SGLang has them by
version of Triton, of which the newest that has one is taken, as it does itself.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any
from zipfile import ZipFile

from leanmoe.core.files import write_json
from leanmoe.predict.constants import ANY

NAME = re.compile(
    r"(?:triton_(?P<triton>[0-9_]+)/)?E=(?P<experts>\d+),N=(?P<width>\d+),"
    r"device_name=NVIDIA_(?P<gpu>H200|H100_80GB_HBM3)"
    r"(?P<blocks>,dtype=fp8_w8a8,block_shape=\[128, ?128\])?\.json$"
)
GPUS = {"H200": "h200", "H100_80GB_HBM3": "h100"}
LEAST_EXPERTS = 8


def steps(configurations: dict[str, Any]) -> str:
    """`up to:rows x columns` for each range of tokens: the nearest configuration is taken."""
    sizes = sorted(int(name) for name in configurations if name.isdigit())
    found: list[tuple[float, str]] = []
    for number, size in enumerate(sizes):
        named = configurations[str(size)]
        tile = f"{named['BLOCK_SIZE_M']}x{named['BLOCK_SIZE_N']}"
        up_to = ANY if number + 1 == len(sizes) else (size + sizes[number + 1]) // 2
        if found and found[-1][1] == tile:
            found.pop()
        found.append((up_to, tile))
    return " ".join(f"{up_to:.0f}:{tile}" for up_to, tile in found)


def tiles(wheel: Path) -> list[dict[str, Any]]:
    """Every layer that an engine's wheel has a configuration of."""
    engine = wheel.name.split("-")[0]
    newest: dict[tuple[Any, ...], tuple[tuple[int, ...], str]] = {}
    with ZipFile(wheel) as archive:
        for name in archive.namelist():
            match = NAME.search(name)
            if match is None or int(match["experts"]) < LEAST_EXPERTS:
                continue
            if engine == "sglang" and match["triton"] is None:  # such a file is never read
                continue
            version = tuple(int(part) for part in (match["triton"] or "0").split("_"))
            key = (
                f"{engine}-triton",
                "fp8_block" if match["blocks"] else "bfloat16",
                GPUS[match["gpu"]],
                int(match["experts"]),
                int(match["width"]),
            )
            if key not in newest or version > newest[key][0]:
                newest[key] = (version, steps(json.loads(archive.read(name))))
    names = ("kernel", "dtype", "gpu", "experts", "width")
    return [
        {**dict(zip(names, key, strict=True)), "tiles": found}
        for key, (_, found) in sorted(newest.items())
    ]


def main() -> None:
    """Reads the wheels, writes a file for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("wheels", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/predict/data/tiles"))
    arguments = parser.parse_args()
    for wheel in arguments.wheels:
        engine, version = wheel.name.split("-")[:2]
        found = tiles(wheel)
        path = arguments.output / f"{engine}-{version}.json"
        source = f"configurations of the fused MoE kernel in {engine} {version} (Apache-2.0)"
        write_json(path, {"label": "cited", "source": source, "layers": found})
        print(f"{path}: {len(found)} layers")


if __name__ == "__main__":
    main()
