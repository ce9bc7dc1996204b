"""How weights are stored, from the headers of a checkpoint's shards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from leanmoe.core.errors import LeanMoeError
from leanmoe.models.shape import read_shape
from leanmoe.models.shards import _part

CONFIG: dict[str, Any] = {
    "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "vocab_size": 64,
    "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_experts": 4,
    "num_experts_per_tok": 2, "mlp_only_layers": [0], "tie_word_embeddings": False,
    "dtype": "bfloat16",
}  # fmt: skip
EXPERT = 3 * 32 * 16


def _tensors(expert_bytes: float, dtype: str) -> dict[str, tuple[str, int]]:
    """Dtype and bytes of each tensor: attention in fp8, all else but the experts in bf16."""
    tensors = {"model.embed_tokens.weight": ("BF16", 2 * 64 * 32)}
    tensors["lm_head.weight"] = ("BF16", 2 * 64 * 32)
    for layer in (0, 1):
        tensors[f"model.layers.{layer}.self_attn.q_proj.weight"] = ("F8_E4M3", 32 * 32)
        tensors[f"model.layers.{layer}.self_attn.k_proj.weight"] = ("F8_E4M3", 32 * 16)
        tensors[f"model.layers.{layer}.self_attn.v_proj.weight"] = ("F8_E4M3", 32 * 16)
        tensors[f"model.layers.{layer}.self_attn.o_proj.weight"] = ("F8_E4M3", 32 * 32)
    tensors["model.layers.0.mlp.up_proj.weight"] = ("BF16", 2 * 3 * 32 * 48)
    tensors["model.layers.1.mlp.gate.weight"] = ("BF16", 2 * 4 * 32)
    for expert in range(4):
        name = f"model.layers.1.mlp.experts.{expert}.down_proj.weight"
        tensors[name] = (dtype, int(expert_bytes * EXPERT))
    # A layer that predicts further tokens, and another stack: not the decoder's.
    tensors["model.layers.2.mlp.experts.0.down_proj.weight"] = ("F32", 4 * EXPERT)
    tensors["mtp.layers.0.mlp.experts.0.down_proj.weight"] = ("F32", 4 * EXPERT)
    tensors["model.visual.blocks.0.mlp.up_proj.weight"] = ("F32", 999)
    return tensors


def _write(folder: Path, tensors: dict[str, tuple[str, int]], **changes: Any) -> str:
    offset, header = 0, {}
    for name, (dtype, size) in tensors.items():
        header[name] = {"dtype": dtype, "shape": [size], "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    return str(folder)


def test_headers_decide_part_by_part(tmp_path: Path) -> None:
    stored = read_shape(_write(tmp_path, _tensors(1, "F8_E4M3"))).storage
    assert (stored.name, stored.expert_bytes) == ("fp8", 1.0)
    assert stored.mixer_bytes == pytest.approx(1.0, rel=0.02)  # norms are no tensors here
    assert (stored.dense_bytes, stored.head_bytes, stored.router_bytes) == (2.0, 2.0, 2.0)
    assert stored.source == "headers of the shards"


def test_headers_tell_what_settings_do_not(tmp_path: Path) -> None:
    unknown = {"quant_method": "new"}
    folder = _write(tmp_path, _tensors(0.53125, "U8"), quantization_config=unknown)
    stored = read_shape(folder).storage
    assert (stored.unknown, stored.name) == (None, "4.25 bits")
    assert stored.expert_bytes == pytest.approx(0.53125)


def test_settings_name_the_format_where_headers_agree(tmp_path: Path) -> None:
    awq = {"quant_method": "awq", "w_bit": 4, "q_group_size": 128}
    folder = _write(tmp_path, _tensors(0.5156, "I32"), quantization_config=awq)
    assert read_shape(folder).storage.name == "int4"


def test_settings_decide_where_a_shard_is_missing(tmp_path: Path) -> None:
    folder = _write(tmp_path, _tensors(1, "F8_E4M3"))
    index = {"weight_map": {"a": "model.safetensors", "b": "missing.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    stored = read_shape(folder).storage
    assert (stored.expert_bytes, stored.source) == (2.0, "config.json")


def test_modelopts_own_file_counts_where_config_json_is_silent(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    settings = {"quantization": {"quant_algo": "NVFP4", "exclude_modules": ["lm_head"]}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(settings))
    assert read_shape(str(tmp_path)).storage.name == "nvfp4"


DEEP = (5000).to_bytes(8, "little") + b"[" * 5000
FAR = b'{"a": {"dtype": "BF16", "shape": [1], "data_offsets": [0, 1' + b"0" * 400 + b"]}}"
FAR = len(FAR).to_bytes(8, "little") + FAR


@pytest.mark.parametrize(
    "content", [b"\xff" * 16, b"\x02\0\0\0\0\0\0\0[]", b"\x02\0\0\0\0\0\0\0{{", DEEP, FAR]
)
def test_a_damaged_shard_is_named(tmp_path: Path, content: bytes) -> None:
    folder = _write(tmp_path, {})
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(LeanMoeError, match=r"model\.safetensors is damaged"):
        read_shape(folder)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("layers.1.ffn.experts.0.w1.scale", "expert"),  # DeepSeek-V4's own names
        ("layers.1.ffn.gate.weight", "routers"),
        ("layers.1.attn.wq_a.weight", "mixers"),
        ("embed.weight", "embedding"),
        ("head.weight", "head"),
        ("mtp.0.ffn.experts.0.w1.weight", None),
        ("language_model.model.layers.1.mlp.experts.0.up_proj.weight_packed", "expert"),
        ("model.layers.1.mlp.switch_mlp.up_proj.scales", "expert"),  # MLX
        ("model.layers.1.block_sparse_moe.gate.weight", "routers"),
        ("vision_tower.encoder.layers.1.mlp.up_proj.weight", None),
        ("model.word_embeddings.weight", "embedding"),  # Ling
    ],
)
def test_tensors_are_told_apart_by_their_published_names(name: str, part: str | None) -> None:
    assert _part(name, 2) == part
