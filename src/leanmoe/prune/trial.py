"""A written checkpoint is loaded by Transformers and run once, before the command says done."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from leanmoe.core.errors import LeanMoeError, first_line
from leanmoe.core.files import read_json, size_text
from leanmoe.models.hf_config import FILE
from leanmoe.models.shape import read_shape
from leanmoe.prune.quantisation import SETTINGS

TOKENS = 8
MEMORY_FACTOR = 1.2
"""Memory that loading takes, over the weights' bytes."""


def run_once(folder: Path, weight_bytes: int, trust_remote_code: bool = False) -> str:
    """A sentence: that the checkpoint was run, or why it cannot be run here.

    Raises LeanMoeError where it loads or runs otherwise than the model that it was made from would:
    tensors of other sizes than the config says, tensors that are missing, logits that are not
    finite numbers.
    """
    if reason := _not_here(folder, weight_bytes):
        return f"It was not run: {reason}"
    from transformers import AutoModelForCausalLM

    try:
        model, about = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype="auto",
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except RuntimeError as error:  # sizes that differ from the config's
        raise _does_not_run(folder, error) from error
    except Exception as error:  # classes and packages that are not there raise their own
        return f"It was not run: Transformers cannot load it ({first_line(error)})"
    if missing := sorted(about["missing_keys"]):
        raise LeanMoeError(f"the checkpoint in {folder} does not run: it lacks {missing[0]}")
    _run(model.eval(), folder)
    return "It was loaded and run once."


@torch.inference_mode()
def _run(model: Any, folder: Path) -> None:
    ids_SN = torch.arange(1, TOKENS + 1)[None]
    try:
        logits = model(input_ids=ids_SN, use_cache=False).logits
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise _does_not_run(folder, error) from error
    if not bool(logits.isfinite().all()):
        raise LeanMoeError(
            f"the checkpoint in {folder} gives logits that are not finite numbers: check the "
            "weights it was made from"
        )


def _not_here(folder: Path, weight_bytes: int) -> str | None:
    config = read_json(folder / FILE, "config")
    if any(name in config for name in SETTINGS):
        return "its weights are quantised, load it in the engine that serves it"
    if (reason := read_shape(config).not_runnable) is not None:
        return reason
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if MEMORY_FACTOR * weight_bytes > free:
        return f"its weights are {size_text(weight_bytes)}, and {size_text(free)} of memory is free"
    return None


def _does_not_run(folder: Path, error: Exception) -> LeanMoeError:
    return LeanMoeError(f"the checkpoint in {folder} does not run: {first_line(error)}")
