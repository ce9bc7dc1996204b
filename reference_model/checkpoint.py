"""Training state in one safetensors file: nothing in it is ever unpickled.

Tensors: float32 masters, both moments, the routers' biases, generator states. The file's own
metadata holds a JSON record: step, tokens, settings, the data's sha256. One file, so that one
rename makes a checkpoint whole or absent.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from leanmoe.core.errors import LeanMoeError
from leanmoe.core.files import write_with
from reference_model.architecture import biased_routers, correction_bias
from reference_model.optimiser import MasterAdamW

CHECKPOINT_SCHEMA = 1


def save(path: Path, model: PreTrainedModel, adam: MasterAdamW, record: dict[str, Any]) -> None:
    """Writes everything that `restore` needs to go on bit for bit."""
    tensors = dict(adam.state())
    for layer, gate in enumerate(biased_routers(model)):
        tensors[f"bias.{layer}"] = correction_bias(gate)
    tensors["rng.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"leanmoe": json.dumps({"schema": CHECKPOINT_SCHEMA, **record})}
    write_with(path, lambda temporary: save_file(held, temporary, metadata=metadata))


def read_record(path: Path) -> dict[str, Any]:
    """The JSON record of a checkpoint."""
    try:
        with safe_open(path, framework="pt") as file:
            record = json.loads((file.metadata() or {}).get("leanmoe", "null"))
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise LeanMoeError(f"cannot read checkpoint {path}: {error}") from error
    if not isinstance(record, dict) or record.get("schema") != CHECKPOINT_SCHEMA:
        raise LeanMoeError(f"{path} is not a training checkpoint of schema {CHECKPOINT_SCHEMA}")
    return record


def restore(path: Path, model: PreTrainedModel, adam: MasterAdamW) -> None:
    """Puts the tensors of a checkpoint into `model` and `adam`, and sets the generators."""
    with safe_open(path, framework="pt") as file:
        tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    try:
        adam.load(tensors)
        for layer, gate in enumerate(biased_routers(model)):
            correction_bias(gate).copy_(tensors[f"bias.{layer}"])
    except KeyError as error:
        raise LeanMoeError(f"checkpoint {path} lacks {error}: another model's") from error
    torch.set_rng_state(tensors["rng.cpu"])
    if torch.cuda.is_available() and "rng.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["rng.cuda"])


def export(model: PreTrainedModel, folder: Path, shard_bytes: int) -> None:
    """The bf16 model as Transformers and vLLM load it: config and safetensors shards."""
    folder.mkdir(parents=True, exist_ok=True)
    chosen = model.config._experts_implementation
    # For generation only: padding is masked there, and the model's own config has no padding id.
    model.generation_config.pad_token_id = model.config.eos_token_id
    model.save_pretrained(folder, max_shard_size=shard_bytes)
    model.config._experts_implementation = chosen
