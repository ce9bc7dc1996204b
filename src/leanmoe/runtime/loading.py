"""Loading a Transformers model: what cannot run is refused before its weights are read."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from leanmoe.core.errors import LeanMoeError
from leanmoe.models.reference import folder_of
from leanmoe.models.shape import read_shape
from leanmoe.runtime.model import find_layers

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(
    name: str,
    dtype: str | None = None,
    trust_remote_code: bool = False,
    require: Callable[[Any], object] = find_layers,
) -> tuple[Any, Any]:
    """The model, ready to run, and its tokenizer.

    `name` is a folder, a hub name (local cache first, then the network) or "reference". Without
    `dtype` weights load as float32 on a CPU and as they are stored on a GPU. Only safetensors are
    read: nothing is unpickled. `require` is called with the model before it has weights, and raises
    LeanMoeError where the model cannot do what it is loaded for.

    Raises LeanMoeError for what is missing, damaged, no mixture-of-experts model, or one that
    Transformers or a plan cannot run; the last two before any weight is read.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    shape = read_shape(name)
    shape.fingerprint()
    if shape.not_loadable is not None:
        raise LeanMoeError(
            f"model {name} cannot be run here: {shape.not_loadable}; inspect, predict, export and "
            "serve with vLLM read its config.json alone"
        )
    if dtype is not None and dtype not in DTYPES:
        raise LeanMoeError(f"dtype is {dtype!r}: it must be one of {', '.join(DTYPES)}")
    local = Path(name)
    is_config = local.name == "config.json" and local.is_file()
    source = str(local.parent) if is_config else folder_of(name)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    wanted: Any = DTYPES[dtype] if dtype else (torch.float32 if device == "cpu" else "auto")
    code = {"trust_remote_code": trust_remote_code}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **code)
        check_tokens(tokenizer, shape.vocabulary)
        with torch.device("meta"):
            require(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source, **code)))
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=wanted, use_safetensors=True, **code
        )
    except LeanMoeError:
        raise
    except Exception as error:  # safetensors, the hub and Transformers each raise their own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise LeanMoeError(f"model {name} cannot be loaded: {reason}") from error
    model = model.to(device).eval()
    find_layers(model)
    return model, tokenizer


def check_tokens(tokenizer: Any, rows: int) -> None:
    """Raises LeanMoeError where text gives token ids beyond the model's embedding of `rows`.

    Added tokens beyond it, which plain text does not give, are said on standard error.
    """
    added = getattr(tokenizer, "added_tokens_decoder", {})
    ids = tokenizer.get_vocab().values()
    highest = max((each for each in ids if each not in added), default=-1)
    if highest >= rows:
        raise LeanMoeError(
            f"the tokenizer has token ids up to {highest:,}, the model's embedding {rows:,} rows: "
            "they do not belong together"
        )
    if beyond := [number for number in added if number >= rows]:
        print(
            f"leanmoe: {len(beyond)} added tokens of the tokenizer (ids from {min(beyond):,}) have "
            f"no row in the model's embedding of {rows:,}: text that holds them cannot be run",
            file=sys.stderr,
        )
