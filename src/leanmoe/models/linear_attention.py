"""Weights of what stands in attention's place: linear attention, Mamba, convolutions.

Each function counts the parameters of one layer from a model's settings, as Transformers builds
it. None of these layers has a KV cache. Needs no torch.
"""

from __future__ import annotations

import math

from leanmoe.models.attention import Mixer
from leanmoe.models.hf_config import HfConfig


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
    """Kimi Linear's delta attention (arXiv 2510.26692); gates of low or of full rank.

    With `use_full_rank_gate` (Kimi-K3) it is the output's gate alone that has full rank.
    """

    def count(settings: HfConfig, _layer: int) -> int:
        hidden = settings.whole("hidden_size", least=1)
        part = settings.part("linear_attn_config")
        heads = settings.whole("linear_num_heads", settings.whole("num_attention_heads", least=1))
        width = settings.whole("linear_head_dim", settings.whole("head_dim", 0))
        kernel = settings.whole("linear_conv_kernel_dim", 4)
        heads, width = part.whole("num_heads", heads), part.whole("head_dim", width, least=1)
        kernel = part.whole("short_conv_kernel_size", kernel)
        rows = heads * width
        low, full = width * (hidden + rows), hidden * rows
        has_full = not low_rank or part.flag("use_full_rank_gate")
        gates = (low if low_rank else full) + (full if has_full else low)
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
