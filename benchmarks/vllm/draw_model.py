"""Writes a checkpoint of drawn weights in the shape of a published model, with a tokenizer.

    python -m benchmarks.vllm.draw_model qwen3-30b-a3b drawn --layers 8

For what needs a checkpoint on disk and routes its own tokens (`leanmoe bench --engine vllm`), where
the published weights are not at hand. A drawn router spreads tokens nearly evenly over the experts;
what such a model says means nothing. The tokenizer is the reference model's.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from benchmarks.vllm.shapes import SHAPES, config_of

TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


def draw(folder: Path, config: dict[str, Any]) -> None:
    """A model of this config, drawn as its class initialises itself, in bfloat16."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    written = folder / "config.json"
    written.write_text(json.dumps(config))
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    written.write_text(json.dumps(config))  # as published: transformers writes names of its own


def main() -> None:
    """Runs it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, help="decoder layers, in place of the shape's own")
    options = parser.parse_args()
    if options.folder.exists():
        sys.exit(f"{options.folder} is there already")
    draw(options.folder, config_of(options.shape, options.layers))
    from leanmoe.models.reference import path

    for name in TOKENIZER:
        shutil.copyfile(path() / name, options.folder / name)
    print(options.folder)


if __name__ == "__main__":
    main()
