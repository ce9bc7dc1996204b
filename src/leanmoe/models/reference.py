"""The small DeepSeek-V3-style model that ships with leanmoe.

`path()` needs neither torch nor Transformers. `reference_model/` in the repository trained it.
"""

from __future__ import annotations

from pathlib import Path

from leanmoe.core.errors import LeanMoeError

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
