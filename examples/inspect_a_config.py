"""What fewer experts could save on a model you have not downloaded: only its config is read.

python examples/inspect_a_config.py
"""

from leanmoe.models.hf_config import read_config
from leanmoe.models.shape import distinct_uniform, read_shape

config = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_hidden_layers": 48,
    "hidden_size": 2048,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 151936,
    "norm_topk_prob": True,
}
shape = read_shape(config)  # or read_shape(read_config("Qwen/Qwen3-30B-A3B")), from the hub
assert callable(read_config)

print(f"{shape.architecture}: {shape.total_parameters() / 1e9:.1f}B parameters")
print("requests  distinct experts a layer reads in one decode step, of", shape.experts)
for batch in (1, 8, 32, 128):
    counts = [distinct_uniform(shape.experts, k, batch) for k in (shape.top_k, 6, 4)]
    print(f"{batch:8d}  k=8: {counts[0]:5.1f}   k=6: {counts[1]:5.1f}   k=4: {counts[2]:5.1f}")
