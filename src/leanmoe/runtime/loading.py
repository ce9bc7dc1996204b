"""Loads a model and its tokenizer: from a folder, by hub name, or the one that ships."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from leanmoe.core.errors import LeanMoeError
from leanmoe.models.shape import REFERENCE, read_shape
from leanmoe.runtime.layers import find_layers

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(
    name: str, dtype: str | None = None, trust_remote_code: bool = False
) -> tuple[Any, Any]:
    """The model, ready to run, and its tokenizer.

    `name` is a folder, a hub name (local cache first, then the network) or "reference". Without
    `dtype` weights load as float32 on a CPU and as they are stored on a GPU. Only safetensors are
    read: nothing is unpickled. Raises LeanMoeError for what is missing, damaged or no
    mixture-of-experts model.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    read_shape(name)
    if dtype is not None and dtype not in DTYPES:
        raise LeanMoeError(f"dtype is {dtype!r}: it must be one of {', '.join(DTYPES)}")
    source = _source(name)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    wanted: Any = DTYPES[dtype] if dtype else (torch.float32 if device == "cpu" else "auto")
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=wanted, use_safetensors=True, trust_remote_code=trust_remote_code
        )
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except LeanMoeError:
        raise
    except Exception as error:  # safetensors, the hub and Transformers each raise their own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise LeanMoeError(f"model {name} cannot be loaded: {reason}") from error
    model = model.to(device).eval()
    find_layers(model)
    return model, tokenizer


def _source(name: str) -> str:
    if name == REFERENCE:
        from leanmoe.models.reference import path

        return str(path())
    local = Path(name)
    return str(local.parent) if local.name == "config.json" and local.is_file() else name
