"""Pruned checkpoints through llama.cpp's own converter, wherever LLAMA_CPP names its folder.

Nothing of llama.cpp is in this repository. Where llama-cpp-python is installed too, what was
converted is loaded and compared with Transformers.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from leanmoe.models.reference import path
from leanmoe.models.shape import MoEShape, read_shape
from leanmoe.prune.checkpoint import read_source, write_pruned
from leanmoe.prune.criteria import best_experts
from tests import tiny

LLAMA_CPP = os.environ.get("LLAMA_CPP", "")
pytestmark = pytest.mark.skipif(
    not (Path(LLAMA_CPP) / "convert_hf_to_gguf.py").is_file(),
    reason="LLAMA_CPP names no folder with llama.cpp's convert_hf_to_gguf.py",
)
FAMILIES = ("deepseek_v2", "deepseek_v3", "gpt_oss", "mixtral", "olmoe", "qwen3_moe")
CONVERT = """
import sys
folder, model, output = sys.argv[1:]
sys.path[:0] = [folder, folder + "/gguf-py"]
import conversion.base
# It knows tokenizers by a hash, and the reference model's is none of those it knows.
conversion.base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
import convert_hf_to_gguf
sys.argv = ["convert_hf_to_gguf.py", model, "--outfile", output, "--outtype", "f32"]
convert_hf_to_gguf.main()
"""
"""Runs the converter as it is, its table of tokenizers aside."""
OWN_SIZES = {"vocab_size": 7936, "hidden_size": 64, "initializer_range": 0.2}
"""The reference tokenizer's, and widths that llama.cpp's kernels take."""
KEPT = 12
AS_LLAMA_CPP: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"n_group": 1, "topk_group": 1, "topk_method": "greedy"},
    "olmoe": {"norm_topk_prob": False},
    "qwen3_moe": {"attention_bias": False},
}
"""Settings of the published models that llama.cpp takes for granted; ours differ in tests."""
OTHERWISE = ("deepseek_v3", "gpt_oss")
"""So tiny, these come out otherwise than in Transformers (by up to 2.7 and 0.1), pruned or not."""
NEAR = 5e-3
"""Of log-probabilities in float32, sums in another order."""
F32 = 0
"""As ggml numbers types."""
IDS = [0, 5, 17, 99, 1234, 40, 7]


def pruned(source: Path, folder: Path, kept: int) -> MoEShape:
    """Writes a checkpoint with `kept` experts a layer, others in each; returns its shape."""
    found = read_source(source)
    scores = np.random.default_rng(0).random((len(found.shape.moe_layers), found.shape.experts))
    write_pruned(found, best_experts(scores, kept, found.shape), folder, {}, lambda _: None)
    return read_shape(str(folder))


def converted(folder: Path) -> Path:
    """The checkpoint as a gguf file in float32."""
    target = folder.with_suffix(".gguf")
    command = [sys.executable, "-c", CONVERT, LLAMA_CPP, str(folder), str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return target


def read_gguf(file: Path) -> Any:
    sys.path.insert(0, str(Path(LLAMA_CPP) / "gguf-py"))
    try:
        return import_module("gguf").GGUFReader(file)
    finally:
        sys.path.pop(0)


def check_experts(reader: Any, folder: Path, shape: MoEShape) -> None:
    """Counts in the header, and every expert tensor and router row that remains."""

    def number(name: str) -> int:
        field = next(f for key, f in reader.fields.items() if key.endswith(f".{name}"))
        return int(field.contents())

    assert number("expert_count") == shape.experts
    assert number("expert_used_count") == shape.top_k
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    for layer in shape.moe_layers:
        router = tensors[f"blk.{layer}.ffn_gate_inp.weight"]
        assert router.data.shape == (shape.experts, shape.hidden)
        experts = [t for name, t in tensors.items() if name.startswith(f"blk.{layer}.ffn_")
                   and "_exps" in name]  # fmt: skip
        assert len(experts) >= 2
        assert {tensor.data.shape[0] for tensor in experts} == {shape.experts}
    layer = shape.moe_layers[-1]
    rows = router_rows(folder, layer, shape.experts)
    np.testing.assert_array_equal(tensors[f"blk.{layer}.ffn_gate_inp.weight"].data, rows)


def router_rows(folder: Path, layer: int, experts: int) -> Any:
    """[E,D] of the pruned checkpoint itself."""
    from safetensors import safe_open

    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as shard:
            for name in shard.keys():  # noqa: SIM118, no mapping
                inside = f"layers.{layer}." in name
                if inside and name.endswith(("gate.weight", "router.weight")):
                    rows = shard.get_tensor(name).float().numpy()
                    if rows.shape[0] == experts:
                        return rows
    raise AssertionError(f"no router in layer {layer}")


def log_probabilities(file: Path, ids: list[int]) -> Any:
    """[T,V] after each token, by llama.cpp."""
    exact = {"type_k": F32, "type_v": F32}  # of the cache, which is float16 by default
    made = import_module("llama_cpp").Llama(
        str(file), n_ctx=64, logits_all=True, verbose=False, **exact
    )
    made.eval(ids)
    logits = torch.from_numpy(np.array(made.scores[: len(ids)])).double()
    return logits.log_softmax(-1)


@torch.inference_mode()
def by_transformers(folder: Path, ids: list[int]) -> Any:
    """[T,V] after each token."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model(torch.tensor([ids])).logits[0].double().log_softmax(-1)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pruned_family_converts_and_says_the_same(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = tiny.config(family, **OWN_SIZES, **AS_LLAMA_CPP.get(family, {}))
    model = AutoModelForCausalLM.from_config(config).to(torch.float32)
    model.save_pretrained(tmp_path / "full")
    shape = pruned(tmp_path / "full", tmp_path / "pruned", KEPT)
    assert shape.experts == KEPT
    AutoTokenizer.from_pretrained(path()).save_pretrained(tmp_path / "pruned")
    file = converted(tmp_path / "pruned")
    check_experts(read_gguf(file), tmp_path / "pruned", shape)
    if find_spec("llama_cpp") is not None:
        ours, theirs = by_transformers(tmp_path / "pruned", IDS), log_probabilities(file, IDS)
        assert bool(theirs.isfinite().all())
        assert float(ours.exp().max()) > 2 / OWN_SIZES["vocab_size"], "all tokens are as likely"
        if family not in OTHERWISE:
            torch.testing.assert_close(theirs, ours, rtol=0, atol=NEAR)


def test_the_pruned_reference_model_converts(tmp_path: Path) -> None:
    """llama.cpp does not load it, pruned or not: it takes a DeepSeek-V3 without q_lora_rank for
    one of 26 or 27 layers alone."""
    shape = pruned(path(), tmp_path / "pruned", 40)
    check_experts(read_gguf(converted(tmp_path / "pruned")), tmp_path / "pruned", shape)
