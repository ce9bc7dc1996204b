"""The families of which vLLM runs a tiny model in these tests, and what each needs beside `SIZES`.

`test_families.py` runs them; the page of families says so. It imports neither torch nor vLLM.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SIZES: Mapping[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 128,
    "intermediate_size": 48,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 4,
    "moe_k": 4,
    "top_k_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "moe_layer_start_index": 1,
    "norm_topk_prob": True,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "sliding_window": 16,
    "hidden_size_per_layer_input": 0,
    "global_head_dim": 32,
}
"""Heads are as wide as vLLM's attention on a CPU takes them."""
RUN: Mapping[str, Mapping[str, Any]] = {
    "gemma4_text": {"enable_moe_block": True, "tie_word_embeddings": True},
    "qwen3_moe": {},
}
"""By `model_type`. The reference model, which `test_vllm.py` runs, is a deepseek_v3."""
REFERENCE = "deepseek_v3"
