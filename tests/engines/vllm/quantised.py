"""A drawn Qwen3-MoE checkpoint with int8 experts (compressed-tensors' W8A8), and what stands in for
vLLM's kernel of such experts on a CPU without AMX.

Letters: T tokens (rows of a step), K slots of a token, D hidden width.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

HIDDEN, EXPERT, VOCABULARY, HEADS, HEAD = 128, 64, 256, 2, 64
EXPERTS, TOP_K, LAYERS = 16, 4, 3
MOST = 127
"""The largest int8 in use."""
CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": HIDDEN,
    "intermediate_size": EXPERT,
    "moe_intermediate_size": EXPERT,
    "num_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
    "norm_topk_prob": True,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "head_dim": HEAD,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "hidden_act": "silu",
    "attention_bias": False,
    "dtype": "bfloat16",
    "quantization_config": {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head", "re:.*self_attn.*", "re:.*gate$"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 8, "type": "int", "symmetric": True,
                            "strategy": "channel", "dynamic": False},
                "input_activations": {"num_bits": 8, "type": "int", "symmetric": True,
                                      "strategy": "token", "dynamic": True},
            }
        },
    },
}  # fmt: skip


def write_checkpoint(folder: Path) -> Path:
    """Draws the model and writes it; returns the folder."""
    generator = torch.Generator().manual_seed(0)

    def drawn(outputs: int, inputs: int, size: float = 1.0) -> Tensor:
        values = torch.randn(outputs, inputs, generator=generator) * (size / math.sqrt(inputs))
        return values.to(torch.bfloat16)

    ones = torch.ones(HIDDEN).bfloat16()
    tensors = {
        "model.embed_tokens.weight": drawn(VOCABULARY, HIDDEN, 8.0),
        "lm_head.weight": drawn(VOCABULARY, HIDDEN),
        "model.norm.weight": ones.clone(),
    }
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{at}.{norm}.weight"] = ones.clone()
        for norm in ("q_norm", "k_norm"):
            tensors[f"{at}.self_attn.{norm}.weight"] = ones[:HEAD].clone()
        for part in ("q_proj", "k_proj", "v_proj"):
            tensors[f"{at}.self_attn.{part}.weight"] = drawn(HEADS * HEAD, HIDDEN)
        tensors[f"{at}.self_attn.o_proj.weight"] = drawn(HIDDEN, HEADS * HEAD)
        tensors[f"{at}.mlp.gate.weight"] = drawn(EXPERTS, HIDDEN, 2.0)
        for expert in range(EXPERTS):
            for part, shape in (("gate_proj", (EXPERT, HIDDEN)), ("up_proj", (EXPERT, HIDDEN)),
                                ("down_proj", (HIDDEN, EXPERT))):  # fmt: skip
                name = f"{at}.mlp.experts.{expert}.{part}"
                values, scale = quantised(drawn(*shape).float())
                tensors[f"{name}.weight"] = values
                tensors[f"{name}.weight_scale"] = scale.bfloat16()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def quantised(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Int8 of each row and its scale (rows, 1), symmetric."""
    scale = (rows.abs().amax(-1, keepdim=True) / MOST).clamp(min=1e-12)
    return (rows / scale).round().to(torch.int8), scale


def stand_in() -> dict[str, Any]:
    """Methods for vLLM's `CPUExpertsInt8`: its kernel needs AMX, plain torch does not."""
    return {
        "_supports_current_device": staticmethod(lambda: True),
        "process_weights_after_loading": lambda _self, _layer: None,
        "apply": apply,
    }


def apply(
    self: Any,
    output: Tensor,
    hidden_states: Tensor,
    w1: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *_: Any,
    **__: Any,
) -> None:
    """Activations are quantised a token at a time; a slot of weight 0 adds nothing."""
    out_TD = torch.zeros(hidden_states.shape, dtype=torch.float32)
    for expert in topk_ids.unique().tolist():
        assert 0 <= expert < w1.shape[0]
        weights_T = (topk_weights * (topk_ids == expert)).sum(-1)
        rows = weights_T.nonzero()[:, 0]
        both = product(hidden_states[rows].float(), w1[expert], self.w1_scale[expert])
        gate, up = both.chunk(2, dim=-1)
        made = product(functional.silu(gate) * up, w2[expert], self.w2_scale[expert])
        out_TD.index_add_(0, rows, made * weights_T[rows, None].float())
    output.copy_(out_TD)


def product(rows: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Rows times an int8 matrix (outputs, inputs) with a scale for each output."""
    values, own = quantised(rows)
    return (values.float() @ weight.float().T) * own * scale.reshape(1, -1).float()
