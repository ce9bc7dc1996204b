"""The small DeepSeek-V3-style model that ships with leanmoe, and how it was trained.

`path()` needs neither torch nor Transformers; the modules beside this file do.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from leanmoe.errors import LeanMoeError

_REQUIRED = ("config.json", "tokenizer.json", "model.safetensors.index.json")


def path() -> Path:
    """The folder of the packaged model, loadable by Transformers' `from_pretrained`."""
    folder = Path(str(resources.files(__name__))) / "model"
    missing = [name for name in _REQUIRED if not (folder / name).is_file()]
    if missing:
        raise LeanMoeError(
            f"the reference model is not in this installation: {folder} lacks {', '.join(missing)}"
        )
    return folder
