"""Rates of everything in a step but the experts, fitted to AIConfigurator's measured tables.

Even rows are fitted, odd ones tell how far off that is. Part of `fit`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from leanmoe.predict.constants import Accuracy
from leanmoe.predict.experts.spread import ranks_touched
from leanmoe.predict.hardware.collectives import EXCHANGED_BYTES
from leanmoe.predict.hardware.gpus import Gpu, Rates
from leanmoe.predict.kernels.fit import accuracy, fit_positive
from leanmoe.predict.kernels.tables import PACKAGE, VERSION, read_columns

LEAST_LATENT_HEADS = 8
"""On a GPU: fewer are not served."""
NETWORK = 0.88
"""Cited: DeepEP's own figures, 43 to 46 of 50 GB/s for 64 ranks (its README, low latency)."""


def least(
    predict: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    took: NDArray[np.float64],
    start: Sequence[float],
) -> tuple[NDArray[np.float64], Accuracy]:
    """Positive constants with the least mean absolute log error on even rows; odd ones test."""

    constants = fit_positive(lambda c: predict(c)[::2], took[::2], start)
    return constants, accuracy("rows not fitted", (predict(constants) / took - 1)[1::2])


def products(gpu: Gpu, dtype: str, source: str) -> tuple[NDArray[np.float64], Accuracy]:
    """Efficiencies and time of a call of a dense product."""
    columns = read_columns(gpu.name, "gemm/vllm/0.24.0/gemm_perf.parquet")
    m, n, k = (columns[name].astype(float) for name in ("m", "n", "k"))
    wanted = (columns["kernel_source"] == source) & (columns["gemm_dtype"] == dtype)
    wanted &= (n >= 512) & (k >= 512) & (m <= 8192) & (n <= 20000) & (k <= 20000)
    m, n, k = m[wanted], n[wanted], k[wanted]
    size = 2.0 if dtype == "bfloat16" else 1.0
    rate = gpu.flops if dtype == "bfloat16" else gpu.flops_fp8
    moved = size * n * k + 2 * m * (n + k)

    def predict(c: NDArray[np.float64]) -> NDArray[np.float64]:
        longer = np.maximum(moved / gpu.bandwidth / c[0], 2 * m * n * k / rate / c[1])
        return np.asarray(c[2] * 1e-6 + longer)

    return least(predict, columns["latency"][wanted] / 1e3, (0.7, 0.6, 4.0))


def decode_attention(gpu: Gpu) -> tuple[NDArray[np.float64], Accuracy]:
    """Bandwidth, time of a call and of a sequence's head, of attention over the cache."""
    columns = read_columns(gpu.name, "attention/vllm/0.24.0/generation_attention_perf.parquet")
    wanted = (columns["window_size"] == 0) & (columns["kv_cache_dtype"] == "bfloat16")
    wanted &= columns["head_dim"] == 128
    batch, context = columns["batch_size"][wanted], columns["step"][wanted] + 1
    heads = batch * columns["num_key_value_heads"][wanted]
    read = heads * context * 2 * 128 * 2.0

    def predict(c: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray((c[1] + heads * c[2]) * 1e-6 + read / gpu.bandwidth / c[0])

    return least(predict, columns["latency"][wanted] / 1e3, (0.7, 6.0, 0.03))


def latent_attention(gpu: Gpu, dense: NDArray[np.float64]) -> tuple[NDArray[np.float64], Accuracy]:
    """Bandwidth, rate, time of a layer and of a sequence of latent attention that decodes.

    The table times DeepSeek-V3's whole module; its products are modelled by `dense`, and what is
    left over is fitted.
    """
    columns = read_columns(gpu.name, "mla/vllm/0.24.0/mla_generation_module_perf.parquet")
    wanted = (columns["gemm_type"] == "bfloat16") & (columns["kv_cache_dtype"] == "bfloat16")
    wanted &= columns["num_heads"] >= LEAST_LATENT_HEADS
    batch, context, heads = (
        columns[name][wanted].astype(float) for name in ("batch_size", "step", "num_heads")
    )
    hidden, queries, latent, rotary, width = 7168, 1536, 512, 64, 128
    weights = hidden * (queries + latent + rotary) + heads * (
        queries * (width + rotary) + latent * 2 * width + hidden * width
    )
    reading = 2 * weights / gpu.bandwidth / dense[0]
    products = 5 * dense[2] * 1e-6 + np.maximum(reading, 2 * weights * batch / gpu.flops / dense[1])
    read = batch * context * (latent + rotary) * 2
    work = 2 * batch * context * heads * (2 * latent + rotary)

    def predict(c: NDArray[np.float64]) -> NDArray[np.float64]:
        longer = np.maximum(read / gpu.bandwidth / c[0], work / gpu.flops / c[1])
        return np.asarray(products + (c[2] + c[3] * batch) * 1e-6 + longer)

    return least(predict, columns["latency"][wanted] / 1e3, (0.7, 0.5, 50.0, 0.1))


def prompt_attention(gpu: Gpu) -> tuple[NDArray[np.float64], Accuracy]:
    """Rate of attention among a prompt's tokens."""
    columns = read_columns(gpu.name, "attention/vllm/0.24.0/context_attention_perf.parquet")
    wanted = (columns["window_size"] == 0) & (columns["kv_cache_dtype"] == "bfloat16")
    wanted &= (columns["head_dim"] == 128) & (columns["isl"] >= 512)
    tokens = columns["isl"][wanted].astype(float)
    work = columns["batch_size"][wanted] * columns["num_heads"][wanted] * tokens**2 * 2 * 128

    def predict(c: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(c[1] * 1e-6 + work / gpu.flops / c[0])

    return least(predict, columns["latency"][wanted] / 1e3, (0.6, 10.0))


def all_reduce(gpu: Gpu) -> tuple[NDArray[np.float64], Accuracy]:
    """Bandwidth, time of a call and of a further hop of vLLM's all-reduce in a graph."""
    columns = read_columns(gpu.name, "comm/vllm/0.24.0/custom_allreduce_perf.parquet")
    wanted = (columns["backend"] == "vllm_graph") & (columns["message_size"] <= 2**27)
    gpus = columns["num_gpus"][wanted].astype(float)
    size = columns["message_size"][wanted].astype(float)

    def predict(c: NDArray[np.float64]) -> NDArray[np.float64]:
        sent = 2 * (gpus - 1) / gpus * size
        hops = (np.log2(gpus) - 1) * c[2] * 1e-6
        return np.asarray(c[1] * 1e-6 + hops + sent / gpu.link / c[0])

    return least(predict, columns["latency"][wanted] / 1e3, (0.6, 5.0, 1.0))


def library(
    gpu: Gpu, operations: Sequence[str], times: int
) -> tuple[NDArray[np.float64], Accuracy]:
    """Bandwidth, time of a call and of a further hop of NCCL's collectives within a node.

    A ring sends (N-1)/N of the bytes so many `times`. Messages are counted in bytes in the rows of
    int8; other rows count values, and are left out.
    """
    columns = read_columns(gpu.name, "comm/nccl/2.29.2/nccl_perf.parquet")
    wanted = np.isin(columns["op_name"], operations) & (columns["nccl_dtype"] == "int8")
    wanted &= columns["message_size"] <= 2**27
    gpus = columns["num_gpus"][wanted].astype(float)
    size = columns["message_size"][wanted].astype(float)

    def predict(c: NDArray[np.float64]) -> NDArray[np.float64]:
        hops = (np.log2(gpus) - 1) * c[2] * 1e-6
        return np.asarray(c[1] * 1e-6 + hops + times * (gpus - 1) / gpus * size / gpu.link / c[0])

    return least(predict, columns["latency"][wanted] / 1e3, (0.6, 5.0, 2.0))


def exchange(gpu: Gpu) -> tuple[NDArray[np.float64], Accuracy]:
    """Bandwidth and time of a call of DeepEP's low-latency dispatch and combine over 8 GPUs."""
    columns = read_columns(gpu.name, "comm/sglang/0.5.12/wideep_deepep_ll_perf.parquet")
    names = ("num_token", "num_topk", "num_experts", "hidden_size")
    tokens, slots, experts, hidden = (columns[n].astype(float) for n in names)
    touched = np.array(
        [ranks_touched(int(e), k, 8, 1, 1) for e, k in zip(experts, slots, strict=True)]
    )
    sent = tokens * touched * 7 / 8 * hidden * EXCHANGED_BYTES
    took = (columns["dispatch_avg_t_us"] + columns["combine_avg_t_us"]) / 2e6

    def predict(c: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(c[1] * 1e-6 + sent / gpu.link / c[0])

    return least(predict, took, (0.4, 10.0))


def shortened(**fields: Any) -> Rates:
    """Rates with every number at four digits."""
    short: dict[str, Any] = {
        name: value if isinstance(value, str) else float(f"{value:.4g}")
        for name, value in vars(Rates(**fields)).items()
    }
    return Rates(**short)


def rates(gpu: Gpu) -> tuple[Rates, dict[str, Any]]:
    """Rates of everything but the experts, with their errors on rows not fitted."""
    dense, dense_error = products(gpu, "bfloat16", "torch.nn.functional.linear")
    _, fp8_error = products(gpu, "fp8_block", "DeepGemmFp8BlockScaledMMKernel")
    decode, decode_error = decode_attention(gpu)
    latent, latent_error = latent_attention(gpu, dense)
    prompt, prompt_error = prompt_attention(gpu)
    reduced, reduced_error = all_reduce(gpu)
    added, added_error = library(gpu, ["all_reduce"], 2)
    gathered, gathered_error = library(gpu, ["all_gather", "reduce_scatter"], 1)
    exchanged, exchanged_error = exchange(gpu)
    found = shortened(
        product_bandwidth=dense[0],
        product_flops=dense[1],
        product_seconds=dense[2] * 1e-6,
        attention_bandwidth=decode[0],
        attention_flops=prompt[0],
        attention_seconds=decode[1] * 1e-6,
        attention_sequence_seconds=decode[2] * 1e-6,
        latent_bandwidth=latent[0],
        latent_flops=latent[1],
        latent_seconds=latent[2] * 1e-6,
        latent_sequence_seconds=latent[3] * 1e-6,
        reduce_bandwidth=reduced[0],
        reduce_seconds=reduced[1] * 1e-6,
        reduce_hop=reduced[2] * 1e-6,
        exchange_bandwidth=exchanged[0],
        exchange_seconds=exchanged[1] * 1e-6,
        network_bandwidth=NETWORK,
        library_bandwidth=added[0],
        library_seconds=added[1] * 1e-6,
        library_hop=added[2] * 1e-6,
        gather_bandwidth=gathered[0],
        gather_seconds=gathered[1] * 1e-6,
        gather_hop=gathered[2] * 1e-6,
        fitted_to=f"vLLM 0.24's kernels, NCCL and DeepEP in {PACKAGE} {VERSION}, {gpu.name}; "
        "between nodes as DeepEP states; a layer's and an engine's own time from vLLM 0.24 on one "
        "H100",
    )
    errors = {
        "dense products, bf16": dense_error,
        "dense products, fp8 blocks (with their own constants)": fp8_error,
        "attention, decode": decode_error,
        "latent attention with its products, decode": latent_error,
        "attention, prompt": prompt_error,
        "all-reduce, vLLM's own": reduced_error,
        "all-reduce, NCCL": added_error,
        "all-gather and reduce-scatter, NCCL": gathered_error,
        "dispatch and combine": exchanged_error,
    }
    return found, {name: vars(error) for name, error in errors.items()}
