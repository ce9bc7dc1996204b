"""The small DeepSeek-V3-style model that ships with leanmoe.

Needs neither torch nor Transformers. `reference_model/` in the repository trained it.
"""

from __future__ import annotations

from pathlib import Path

from leanmoe.core.errors import LeanMoeError

NAME = "reference"
"""The word that stands for it wherever a model is named."""
_REQUIRED = ("config.json", "tokenizer.json", "model.safetensors.index.json")


def path() -> Path:
    """The folder of the packaged model, loadable by Transformers' `from_pretrained`."""
    folder = Path(__file__).with_name("reference_weights")
    missing = [name for name in _REQUIRED if not (folder / name).is_file()]
    if missing:
        raise LeanMoeError(
            f"the reference model is not in this installation: {folder} lacks {', '.join(missing)}"
        )
    return folder


def folder_of(model: str) -> str:
    """What Transformers and engines load: the packaged folder for "reference", else the name."""
    return str(path()) if model == NAME else model
