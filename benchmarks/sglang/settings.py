"""What engines of SGLang are told on one GPU, and how they find leanmoe."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from benchmarks.vllm.shapes import QWEN

ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "SGLANG_SKIP_SGL_KERNEL_VERSION_CHECK": "1"}
"""The second is for a pair of SGLang and kernels that nobody releases."""
PACKED = "SGLang's Python and sglang-kernel are a pair that nobody releases: for measuring alone"
SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
"""Requests of the decode steps that are captured."""
CHECKED = QWEN | {
    "hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4,
    "moe_intermediate_size": 256, "intermediate_size": 512, "num_experts": 64, "vocab_size": 2048,
}  # fmt: skip
"""A shape whose weights are drawn for comparisons of tokens: it has Qwen3's heads, which SGLang's
kernels take."""
GROUP = "sglang.srt.plugins"
PLUGINS = {
    "leanmoe": "leanmoe.serve.sglang.plugin:activate",
    "leanmoe_bench": "benchmarks.sglang.in_engine:activate",
}


def engine_settings(model: Path, place: int, **more: Any) -> dict[str, Any]:
    """Settings of an engine on `model`; `place` tells engines that run at once apart.

    Prompts run eagerly: SGLang would capture dozens of sizes for them.
    """
    return {
        "model_path": str(model), "skip_tokenizer_init": True, "dtype": "bfloat16",
        "random_seed": 0, "attention_backend": "triton", "sampling_backend": "pytorch",
        "moe_runner_backend": "triton", "grammar_backend": "none", "disable_radix_cache": True,
        "disable_prefill_cuda_graph": True, "log_level": "info",
        "port": 31000 + 100 * place, "nccl_port": 31050 + 100 * place, **more,
    }  # fmt: skip


def let_plugins_be_found(folder: Path) -> dict[str, str]:
    """Variables with which SGLang's processes find leanmoe's plugin, and the benchmark's own.

    Both are entry points of a distribution that is made in `folder`, in the place of an installed
    one. The benchmark's does nothing unless it is asked to.
    """
    info = folder / "leanmoe-0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: leanmoe\nVersion: 0\n")
    points = "\n".join(f"{name} = {value}" for name, value in PLUGINS.items())
    (info / "entry_points.txt").write_text(f"[{GROUP}]\n{points}\n")
    root = Path(__file__).parents[2]
    paths = [str(folder), str(root), str(root / "src"), os.environ.get("PYTHONPATH", "")]
    return {**ENVIRONMENT, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
