"""Weights of what mixes a layer's tokens: attention in its forms, linear attention, Mamba.

Each function counts the parameters of one layer from a model's settings, as Transformers builds
it. Needs no torch. Letters: D hidden width, H heads, W head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

from leanmoe.models.hf_config import HfConfig

Mixer = Callable[[HfConfig, int], int]
"""Parameters of the mixer of a decoder layer, by the layer's index."""
HeadNorm = Literal["none", "head", "full"]
"""Norms of queries and keys: none, over each head's width, or over all heads together."""
Gate = Literal["none", "element", "head"]
"""A gate on the attention's output: none, one for each value, or one for each head."""


def attention(
    bias: str | bool = "attention_bias",
    output_bias: bool = False,
    norm: HeadNorm = "none",
    norm_flag: str | None = None,
    sinks: bool = False,
    gate: Gate = "none",
) -> Mixer:
    """Grouped-query attention. `bias` and `norm_flag` may name the setting that decides."""

    def count(settings: HfConfig, layer: int) -> int:
        hidden = settings.whole("hidden_size", least=1)
        heads = settings.whole("num_attention_heads", least=1)
        pairs = settings.whole("num_key_value_heads", heads, least=1)
        width = settings.whole("head_dim", hidden // heads, least=1)
        heads = (settings.items("num_attention_heads_per_layer", int) or {layer: heads})[layer]
        rows = heads * width + 2 * pairs * width
        weights = hidden * rows + heads * width * hidden
        if settings.flag(bias) if isinstance(bias, str) else bias:
            weights += rows + (hidden if output_bias else 0)
        if norm != "none" and (norm_flag is None or settings.flag(norm_flag)):
            weights += 2 * width if norm == "head" else (heads + pairs) * width
        gates = {"none": 0, "element": heads * width, "head": heads}[gate]
        return weights + hidden * gates + (heads if sinks else 0)

    return count


def latent_attention(indexer: bool = False, gate: Gate = "none") -> Mixer:
    """Multi-head latent attention (DeepSeek-V2 report, section 2.1), with V3.2's indexer."""

    def count(settings: HfConfig, _layer: int) -> int:
        hidden = settings.whole("hidden_size", least=1)
        heads = settings.whole("num_attention_heads", least=1)
        rope, nope = settings.whole("qk_rope_head_dim"), settings.whole("qk_nope_head_dim")
        value = settings.whole("v_head_dim", least=1)
        down = settings.whole("kv_lora_rank", least=1)
        rank = settings.whole("q_lora_rank", 0)
        queries = heads * (nope + rope)
        weights = rank * (hidden + queries + 1) if rank else hidden * queries
        weights += hidden * (down + rope) + down + down * heads * (nope + value)
        weights += heads * value * hidden
        if settings.flag("attention_bias"):
            weights += rank + down + rope + hidden
        if indexer:
            keys, width = settings.whole("index_n_heads"), settings.whole("index_head_dim")
            weights += rank * keys * width + hidden * (width + keys) + 2 * width
        return weights + (hidden * heads if gate == "head" else 0)

    return count


def hybrid(full: Mixer, other: Mixer) -> Mixer:
    """`full` attention in some layers, `other` in the rest, as the settings list them."""
    return lambda settings, layer: (full if attends(settings, layer) else other)(settings, layer)


def attends(settings: HfConfig, layer: int) -> bool:
    """Whether a hybrid model's layer is one of attention."""
    if kinds := settings.items("layer_types", str):
        return "attention" in kinds[layer] and kinds[layer] != "linear_attention"
    if (flags := settings.items("attn_type_list", int)) is not None:
        return bool(flags[layer])
    if (indices := settings.items("full_attn_idxs", int)) is not None:
        return layer in indices
    full = settings.part("linear_attn_config").items("full_attn_layers", int)
    if full is not None:
        return layer + 1 in full
    if interval := settings.whole("full_attention_interval", 0):
        return (layer + 1) % interval == 0
    if period := settings.whole("attn_layer_period", 0):
        return layer % period == settings.whole("attn_layer_offset", 0)
    return True


def gated_delta_net(settings: HfConfig, _layer: int) -> int:
    """Qwen3-Next's linear attention (arXiv 2412.06464)."""
    hidden = settings.whole("hidden_size", least=1)
    heads = settings.whole("linear_num_value_heads")
    keys = settings.whole("linear_num_key_heads") * settings.whole("linear_key_head_dim")
    width = settings.whole("linear_value_head_dim")
    values = heads * width
    convolution = (2 * keys + values) * settings.whole("linear_conv_kernel_dim")
    projections = hidden * (2 * keys + 2 * values + 2 * heads) + values * hidden
    return projections + convolution + 2 * heads + width


def kimi_delta(low_rank: bool = True) -> Mixer:
    """Kimi Linear's delta attention (arXiv 2510.26692); gates of low or of full rank."""

    def count(settings: HfConfig, _layer: int) -> int:
        hidden = settings.whole("hidden_size", least=1)
        part = settings.part("linear_attn_config")
        heads = settings.whole("linear_num_heads", settings.whole("num_attention_heads", least=1))
        width = settings.whole("linear_head_dim", settings.whole("head_dim", 0))
        kernel = settings.whole("linear_conv_kernel_dim", 4)
        heads, width = part.whole("num_heads", heads), part.whole("head_dim", width, least=1)
        kernel = part.whole("short_conv_kernel_size", kernel)
        rows = heads * width
        gates = 2 * width * (hidden + rows) if low_rank else 2 * hidden * rows
        return 4 * hidden * rows + 3 * rows * kernel + rows + heads + hidden * heads + gates + width

    return count


def lightning_attention(settings: HfConfig, _layer: int) -> int:
    """MiniMax-01's linear attention (arXiv 2501.08313)."""
    hidden = settings.whole("hidden_size", least=1)
    heads = settings.whole("num_attention_heads", least=1)
    rows = heads * settings.whole("head_dim", hidden // heads)
    return hidden * rows * 5 + rows


def mamba(settings: HfConfig, _layer: int) -> int:
    """Jamba's Mamba-1 (arXiv 2403.19887)."""
    hidden = settings.whole("hidden_size", least=1)
    inner, state = settings.whole("mamba_expand") * hidden, settings.whole("mamba_d_state")
    rank = settings.raw("mamba_dt_rank")
    rank = math.ceil(hidden / 16) if rank == "auto" else settings.whole("mamba_dt_rank")
    convolution = inner * (settings.whole("mamba_d_conv") + settings.flag("mamba_conv_bias", True))
    biases = (2 * inner + hidden) if settings.flag("mamba_proj_bias") else 0
    steps = inner * (rank + 2 * state) + rank * inner + inner + rank + 2 * state
    return 3 * hidden * inner + convolution + steps + inner * (state + 1) + biases


def mamba2(settings: HfConfig, _layer: int) -> int:
    """Mamba-2 as in Granite 4 and Nemotron-H (arXiv 2405.21060)."""
    hidden = settings.whole("hidden_size", least=1)
    if "mamba_num_heads" in settings.values:
        heads, groups = settings.whole("mamba_num_heads"), settings.whole("n_groups")
        inner = heads * settings.whole("mamba_head_dim")
        state, kernel = settings.whole("ssm_state_size"), settings.whole("conv_kernel")
        convolution_bias = settings.flag("use_conv_bias", True)
        bias = settings.flag("use_bias")
    else:
        heads, groups = settings.whole("mamba_n_heads"), settings.whole("mamba_n_groups", 1)
        inner = settings.whole("mamba_expand") * hidden
        state, kernel = settings.whole("mamba_d_state"), settings.whole("mamba_d_conv")
        convolution_bias = settings.flag("mamba_conv_bias", True)
        bias = settings.flag("mamba_proj_bias")
    channels = inner + 2 * groups * state
    rows = inner + channels + heads
    weights = hidden * rows + inner * hidden + (rows + hidden if bias else 0)
    return weights + channels * (kernel + convolution_bias) + 3 * heads + inner


def short_convolution(settings: HfConfig, _layer: int) -> int:
    """LFM2's gated short convolution."""
    hidden = settings.whole("hidden_size", least=1)
    biases = 5 * hidden if settings.flag("conv_bias") else 0
    return 4 * hidden * hidden + hidden * settings.whole("conv_L_cache") + biases


def window_and_full(settings: HfConfig, layer: int) -> int:
    """MiMo-V2-Flash: window layers have twice the key-value heads, and sinks."""
    hidden = settings.whole("hidden_size", least=1)
    heads = settings.whole("num_attention_heads", least=1)
    pairs, width = settings.whole("num_key_value_heads"), settings.whole("head_dim")
    value = settings.whole("v_head_dim")
    kinds = settings.items("layer_types", str)
    flags = settings.items("hybrid_layer_pattern", int)
    if kinds is not None:
        window = kinds[layer] == "sliding_attention"
    else:
        window = bool(flags[layer]) if flags is not None else layer != 0 and (layer + 1) % 6 != 0
    pairs = 2 * pairs if window else pairs
    rows = heads * width + pairs * (width + value)
    biases = rows if settings.flag("attention_bias") else 0
    return hidden * rows + heads * value * hidden + (heads if window else 0) + biases
