"""What the benchmarks of vLLM are told alike: their environment and their common options."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from benchmarks.common.results import parser_of
from benchmarks.vllm.shapes import SHAPES

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_USE_DEEP_GEMM": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
}
SEVERAL_GPUS = {
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "NVSHMEM_DISABLE_NVLS": "1",
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
}
"""NVLink multicast stays off: not every machine that lends its GPUs allows it."""
RUNNERS = {"v1": "0", "v2": "1"}
"""vLLM's model runners, and what VLLM_USE_V2_MODEL_RUNNER is for each."""
PREFILL_PLANS = "top_p=0.7: top_p=0.7; threshold=0.3: threshold=0.3"
CACHE_GIB = 0.75
"""Keys and values of an engine that shares its GPU: it cannot tell what the others will take."""
LOADS = "1,2,4,8,16,32,64,128,256,512"


def vllm_parser(
    doc: str | None, plans: str, routings: str = "skewed,uniform"
) -> argparse.ArgumentParser:
    """The options that all have, with the plans and routings that are measured by default."""
    parser = parser_of(doc)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-30b-a3b")
    parser.add_argument("--layers", type=int, help="decoder layers, in place of the shape's own")
    parser.add_argument("--fp8", action="store_true", help="weights in blocks of fp8")
    parser.add_argument("--loads", default=LOADS, help="concurrency, comma separated")
    parser.add_argument("--plans", default=plans, help="name: field=value field=value; ...")
    parser.add_argument("--small-steps", default="auto", help="of drop, group, skip, repeat, auto")
    parser.add_argument("--experts", default="vllm", help="of vllm and leanmoe")
    parser.add_argument("--no-banded", dest="banded", action="store_false", help="no plan of bands")
    parser.add_argument("--routings", default=routings)
    parser.add_argument("--prompt", type=int, default=16, help="tokens of each prompt")
    parser.add_argument("--steps", type=int, default=16, help="engine steps a measurement")
    parser.add_argument("--replays", type=int, default=6, help="captured steps a measurement")
    parser.add_argument("--samples", type=int, default=3, help="of the captured step, a round")
    parser.add_argument("--rounds", type=int, default=7, help="at most")
    parser.add_argument(
        "--seconds", type=float, default=500, help="measure steps for so many at most"
    )
    parser.add_argument(
        "--vllm", default="installed", help="'installed', or a folder to find it in"
    )
    parser.add_argument(
        "--tiles",
        type=Path,
        help="results of kernels.experts_gpu: the tiles found there for vLLM",
    )
    parser.add_argument("--runner", choices=RUNNERS, help="of vLLM's; its own choice if not given")
    parser.add_argument("--prefill", default="", help="tokens of prompts to time, after decoding")
    parser.add_argument("--prefill-plans", default=PREFILL_PLANS, help="as --plans")
    parser.add_argument("--prefill-rounds", type=int, default=5)
    parser.add_argument(
        "--cache-gib", type=float, default=CACHE_GIB, help="keys and values with --lock, GiB"
    )
    parser.add_argument("--memory", type=float, default=0.86, help="share of the GPU's for vLLM")
    parser.add_argument(
        "--lock",
        type=Path,
        help="a file that runs on the same GPUs share: they load beside each other and measure "
        "one after the other",
    )
    return parser


def prepare(vllm: str, more: dict[str, str] | None = None, runner: str | None = None) -> None:
    """Sets the environment, for this process and those it starts, before vLLM is imported."""
    if runner is not None:
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = RUNNERS[runner]
    wanted = {**ENVIRONMENT, **(more or {})}
    os.environ |= {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.pop("LEANMOE_PLAN", None)
    if vllm != "installed" and vllm not in sys.path:
        sys.path.insert(0, vllm)
        os.environ["PYTHONPATH"] = os.pathsep.join(
            [vllm, *filter(None, [os.environ.get("PYTHONPATH")])]
        )


def has_gpu() -> bool:
    """Whether torch sees a GPU; without one the benchmarks run to be tried out."""
    import torch

    return bool(torch.cuda.is_available())


def let_plugin_be_found(folder: Path) -> None:
    """Lets vLLM find the plugin where leanmoe is on the path and not installed."""
    from importlib.metadata import entry_points

    if any(point.name == "leanmoe" for point in entry_points(group="vllm.general_plugins")):
        return
    info = folder / "leanmoe-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: leanmoe\nVersion: 0\n")
    (info / "entry_points.txt").write_text(
        "[vllm.general_plugins]\nleanmoe = leanmoe.serve.vllm.plugin:activate\n"
    )
    os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
