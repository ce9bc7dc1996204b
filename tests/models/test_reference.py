"""The packaged model: as promised, and within its limits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from leanmoe.core.errors import LeanMoeError
from leanmoe.models import reference
from reference_model.architecture import DeepseekV3Settings, correction_bias, routers

MOST_BYTES = 36_000_000
MOST_SHARD_BYTES = 15_000_000


def test_sizes_are_within_the_limits() -> None:
    files = [file for file in reference.path().iterdir() if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= MOST_BYTES
    shards = [file for file in files if file.suffix == ".safetensors"]
    assert shards
    assert all(shard.stat().st_size <= MOST_SHARD_BYTES for shard in shards)


def test_the_config_is_as_promised() -> None:
    config = json.loads((reference.path() / "config.json").read_text())
    promised = DeepseekV3Settings().to_config().to_dict()
    for key in set(promised) - {"dtype", "architectures", "transformers_version"}:
        # Some keys come and go with Transformers' version; those of the architecture do not.
        assert key not in config or config[key] == promised[key], key
    for key, value in {
        "architectures": ["DeepseekV3ForCausalLM"],
        "n_routed_experts": 64,
        "num_experts_per_tok": 8,
        "n_shared_experts": 1,
        "n_group": 8,
        "topk_group": 4,
        "first_k_dense_replace": 1,
        "num_hidden_layers": 7,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "dtype": "bfloat16",
    }.items():
        assert config[key] == value, key


def test_it_loads_without_missing_or_unexpected_weights() -> None:
    model, info = AutoModelForCausalLM.from_pretrained(
        reference.path(), dtype=torch.bfloat16, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for gate in routers(model):
        assert correction_bias(gate).dtype == torch.float32
        assert correction_bias(gate).abs().max() > 0


def test_path_needs_no_torch_and_names_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "import sys, leanmoe.models.reference as r; r.path(); "
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    monkeypatch.setattr(reference, "__file__", str(tmp_path / "reference.py"))
    with pytest.raises(LeanMoeError, match=r"lacks config\.json, tokenizer\.json"):
        reference.path()


def test_the_word_reference_is_its_folder_and_other_names_are_themselves() -> None:
    assert reference.folder_of("reference") == str(reference.path())
    assert reference.folder_of("Qwen/Qwen3-30B-A3B") == "Qwen/Qwen3-30B-A3B"
