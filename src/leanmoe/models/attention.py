"""Attention of a decoder layer: its widths, its weights, and what a step reads and computes.

The counting functions give the parameters of one layer from a model's settings, as Transformers
builds it. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from leanmoe.models.hf_config import HfConfig

Mixer = Callable[[HfConfig, int], int]
"""Parameters of the mixer of a decoder layer, by the layer's index."""
HeadNorm = Literal["none", "head", "full"]
"""Norms of queries and keys: none, over each head's width, or over the width of all heads."""
Gate = Literal["none", "element", "head"]
"""A gate on the attention's output: none, one for each value, or one for each head."""


CACHE_BYTES = 2.0
"""Bytes of a value in the KV cache: bf16, what engines do unless told otherwise."""
COMPRESSED_SPARSE = 4
"""Tokens that DeepSeek-V4 compresses to one where an indexer picks among them."""
WINDOWED: Mapping[str, Callable[[int, int], bool]] = {
    "beam": lambda layer, layers: (layer + 1) % 6 != 0 and layer < layers - 1,
    "flint": lambda layer, layers: layer >= 2 and layer % 4 != 1 and layer < layers - 1,
    "gemma4_text": lambda layer, layers: (layer + 1) % 6 != 0 and layer < layers - 1,
    "gpt_oss": lambda layer, _layers: layer % 2 == 0,
    "granitemoe_swa": lambda layer, _layers: layer % 4 != 0,
    "mimo_v2_flash": lambda layer, _layers: layer != 0 and (layer + 1) % 6 != 0,
    "mixtral": lambda _layer, _layers: True,
    "phimoe": lambda _layer, _layers: True,
    "qwen2_moe": lambda layer, _layers: layer % 2 == 0,
    "qwen3_moe": lambda _layer, _layers: True,
}
"""Which layers (of so many) have a window where a config.json has one and does not say in which,
by model type, as Transformers assumes."""


@dataclass(frozen=True)
class Attention:
    """Attention of one kind of layer."""

    heads: int
    pairs: int
    """Key-value heads."""
    width: int
    """Width of a head of queries and keys."""
    value_width: int
    latent: int = 0
    """Width of what multi-head latent attention caches, without rotary part; 0 for none."""
    rotary: int = 0
    """Width of the rotary key that heads share in latent attention."""
    window: int | None = None
    """Tokens that a layer looks back; None for all."""
    compression: int = 0
    """Tokens beyond the window that one cached value stands for; 0 where they are not cached."""
    copied: int = 0
    """Weights that tensor parallelism does not split: latent attention's down-projections."""

    def cached_width(self, tensor: int = 1) -> float:
        """Values cached for a token on one of `tensor` GPUs: a latent cache is not divided."""
        if self.latent:
            return float(self.latent + self.rotary)
        return (self.width + self.value_width) * max(1.0, self.pairs / tensor)

    def reach(self, context: float) -> float:
        """Tokens a query attends to, of `context`; compressed ones count as the values they are."""
        near = context if self.window is None else min(context, float(self.window))
        return near + ((context - near) / self.compression if self.compression else 0.0)

    def decode_products(self, context: float, tensor: int) -> float:
        """FLOP of one new token: latent attention works on what is cached (absorbed)."""
        heads = self.heads / tensor
        width = 2 * self.latent + self.rotary if self.latent else self.width + self.value_width
        return 2 * heads * width * self.reach(context)

    def prefill_products(self, tokens: float, before: float, tensor: int) -> float:
        """FLOP of a prompt's part of `tokens` after `before` others: not absorbed."""
        heads = self.heads / tensor
        seen = self.reach(before + tokens / 2)
        return 2 * heads * (self.width + self.value_width) * seen * tokens


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
        heads = _heads_of_layer(settings, layer, heads)
        rows = heads * width + 2 * pairs * width
        weights = hidden * rows + heads * width * hidden
        if settings.flag(bias) if isinstance(bias, str) else bias:
            weights += rows + (hidden if output_bias else 0)
        if norm != "none" and (norm_flag is None or settings.flag(norm_flag)):
            weights += 2 * width if norm == "head" else (heads + pairs) * width
        gates = {"none": 0, "element": heads * width, "head": heads}[gate]
        return weights + hidden * gates + (heads if sinks else 0)

    return count


def _heads_of_layer(settings: HfConfig, layer: int, heads: int) -> int:
    """Query heads of one layer where the settings list them, or have others beside a window."""
    if (listed := settings.items("num_attention_heads_per_layer", int, layer + 1)) is not None:
        return int(listed[layer])
    kinds = settings.items("layer_types", str, layer + 1)
    if kinds is None or kinds[layer] != "sliding_attention":
        return heads
    heads = settings.part("attention_other_setting").whole("num_attention_heads", heads)
    return settings.whole("num_sliding_attention_heads", heads)


def plus(*mixers: Mixer) -> Mixer:
    """All of them in each layer."""
    return lambda settings, layer: sum(mixer(settings, layer) for mixer in mixers)


def latent_attention(indexer: Mixer | None = None, gate: Gate = "none") -> Mixer:
    """Multi-head latent attention (DeepSeek-V2 report, section 2.1).

    `indexer` counts what picks the tokens it attends to. With `mla_use_output_gate` (Kimi-K3) the
    gate is one for each value.
    """

    def count(settings: HfConfig, layer: int) -> int:
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
        if indexer is not None:
            weights += indexer(settings, layer)
        elements = gate == "element" or settings.flag("mla_use_output_gate")
        gates = heads * value if elements else heads if gate == "head" else 0
        return weights + hidden * gates

    return count


def indexer(settings: HfConfig, layer: int) -> int:
    """DeepSeek-V3.2's indexer; a layer that shares the one of a layer before it has none.

    GLM-5 says which share in `indexer_types`, `index_topk_pattern` or `index_topk_freq`; GLM-5-Next
    joins `index_kpool` keys to one by weights of their own.
    """
    kinds, pattern = (
        settings.items("indexer_types", str, layer + 1),
        settings.raw("index_topk_pattern"),
    )
    frequency = max(1, settings.whole("index_topk_freq", 1))
    if kinds is not None:
        shares = kinds[layer] == "shared"
    elif isinstance(pattern, str | list):
        shares = pattern[layer] in ("S", "shared")
    else:
        offset = settings.whole("index_skip_topk_offset", 2)
        shares = max(layer - offset + 1, 0) % frequency != 0
    if shares:
        return 0
    hidden, rank = settings.whole("hidden_size", least=1), settings.whole("q_lora_rank")
    keys, width = settings.whole("index_n_heads"), settings.whole("index_head_dim")
    pooled = settings.whole("index_kpool", 0)
    pooling = (pooled + hidden) * width if pooled else 0
    return rank * keys * width + hidden * (width + keys) + 2 * width + pooling


def compressed_attention(settings: HfConfig, layer: int) -> int:
    """DeepSeek-V4: one key-value head, of which most layers keep a compressed past.

    Layers that compress by the lower rate have an indexer too. The output projection is of low
    rank, in groups of heads.
    """
    hidden = settings.whole("hidden_size", least=1)
    heads, width = settings.whole("num_attention_heads", least=1), settings.whole("head_dim")
    rank, groups = settings.whole("q_lora_rank"), settings.whole("o_groups", least=1)
    low = groups * settings.whole("o_lora_rank")
    weights = rank * (hidden + heads * width + 1) + width * (hidden + 1) + heads
    weights += heads * width // groups * low + low * hidden
    rate = _compression(settings, layer)
    if rate == 0:
        return weights
    if rate > COMPRESSED_SPARSE:
        return weights + width * (2 * hidden + rate + 1)
    keys, index = settings.whole("index_n_heads"), settings.whole("index_head_dim")
    both = width + index
    return weights + both * (4 * hidden + 2 * rate + 1) + rank * keys * index + hidden * keys


def _compression(settings: HfConfig, layer: int) -> int:
    """Tokens that DeepSeek-V4 compresses to one in a layer; 0 where it has a window alone."""
    rates = settings.part("compress_rates")
    sparse = rates.whole("compressed_sparse_attention", COMPRESSED_SPARSE)
    heavy = rates.whole("heavily_compressed_attention", 128)
    if (ratios := settings.items("compress_ratios", int, layer + 1)) is not None:
        return int(ratios[layer])
    if (kinds := settings.items("layer_types", str, layer + 1)) is not None:
        known = {"compressed_sparse_attention": sparse, "heavily_compressed_attention": heavy}
        return known.get(kinds[layer], 0)
    return sparse if layer >= 2 and layer % 2 else heavy


def hyper_connections(rows: Callable[[int], int], scales: int) -> Mixer:
    """What mixes a layer's residual streams, before attention and before the experts.

    For `hc_mult` streams each mixing has `rows` outputs of all streams' values (mHC, DeepSeek-V4).
    """

    def count(settings: HfConfig, _layer: int) -> int:
        streams = settings.whole("hc_mult", least=1)
        width = streams * settings.whole("hidden_size", least=1)
        return 2 * (rows(streams) * (width + 1) + scales)

    return count


def stream_head(settings: HfConfig) -> int:
    """What makes one of the residual streams after the last layer (DeepSeek-V4)."""
    streams = settings.whole("hc_mult", least=1)
    return streams * (streams * settings.whole("hidden_size", least=1) + 1) + 1


def sinks(settings: HfConfig, _layer: int) -> int:
    """A sink for each head of attention."""
    return settings.whole("num_attention_heads", least=1)


def per_layer_embeddings(settings: HfConfig) -> int:
    """Gemma's embeddings of their own for each layer, and what puts them in its stream."""
    width = settings.whole("hidden_size_per_layer_input", 0)
    if not width:
        return 0
    layers, hidden = settings.whole("num_hidden_layers", least=1), settings.whole("hidden_size")
    table = settings.whole("vocab_size_per_layer_input", settings.whole("vocab_size"))
    return layers * (width * (table + 3 * hidden) + hidden) + width


def attention_residuals(settings: HfConfig, _layer: int) -> int:
    """Kimi-K3's mixing of earlier layers' outputs, before attention and before the experts."""
    mixes = settings.raw("attn_res_block_size") is not None
    return 4 * settings.whole("hidden_size", least=1) if mixes else 0


def two_widths(settings: HfConfig, layer: int) -> int:
    """Gemma 4: layers with and without a window differ in heads and widths.

    A layer may use another's keys and values (`num_kv_shared_layers`), or its keys as values
    (`attention_k_eq_v`).
    """
    hidden, layers = settings.whole("hidden_size", least=1), settings.whole("num_hidden_layers")
    kind, is_full = attention_of(settings, layer), not has_window(settings, layer)
    weights = 2 * hidden * kind.heads * kind.width + kind.width
    if layer >= layers - settings.whole("num_kv_shared_layers", 0):
        return weights
    matrices = 1 if is_full and settings.flag("attention_k_eq_v") else 2
    return weights + matrices * hidden * kind.pairs * kind.width + kind.width


def hybrid(full: Mixer, other: Mixer) -> Mixer:
    """`full` attention in some layers, `other` in the rest, as the settings list them."""
    return lambda settings, layer: (full if attends(settings, layer) else other)(settings, layer)


def attends(settings: HfConfig, layer: int) -> bool:
    """Whether a hybrid model's layer is one of attention."""
    if kinds := settings.items("layer_types", str, layer + 1):
        return "attention" in kinds[layer] and kinds[layer] != "linear_attention"
    if (flags := settings.items("attn_type_list", int, layer + 1)) is not None:
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


def window_and_full(settings: HfConfig, layer: int) -> int:
    """MiMo-V2-Flash: window layers have twice the key-value heads, and sinks."""
    hidden, kind = settings.whole("hidden_size", least=1), attention_of(settings, layer)
    rows = kind.heads * kind.width + kind.pairs * (kind.width + kind.value_width)
    biases = rows if settings.flag("attention_bias") else 0
    sinks = kind.heads if has_window(settings, layer) else 0
    return hidden * (rows + kind.heads * kind.value_width) + sinks + biases


def attention_of(settings: HfConfig, layer: int) -> Attention:
    """The attention of a decoder layer that has one."""
    heads = settings.whole("num_attention_heads", least=1)
    if settings.raw("o_groups") is not None:  # DeepSeek-V4: keys are values too
        width, window = settings.whole("head_dim", least=1), settings.whole("sliding_window", 128)
        rate = _compression(settings, layer)
        return Attention(heads, 1, width, width, latent=width, window=window, compression=rate)
    if latent := settings.whole("kv_lora_rank", 0):
        rotary = settings.whole("qk_rope_head_dim")
        width = settings.whole("qk_nope_head_dim") + rotary
        value = settings.whole("v_head_dim", least=1)
        down = latent + rotary + settings.whole("q_lora_rank", 0)
        copied = settings.whole("hidden_size", least=1) * down
        return Attention(heads, 1, width, value, latent, rotary, copied=copied)
    hidden = settings.whole("hidden_size", least=1)
    width = settings.whole("head_dim", hidden // heads, least=1)
    pairs = settings.whole("num_key_value_heads", heads, least=1)
    value = settings.whole("v_head_dim", width, least=1)
    heads = _heads_of_layer(settings, layer, heads)
    if has_window(settings, layer):  # MiMo: heads of their own, twice the key-value heads
        twice = 2 * pairs if settings.raw("model_type") == "mimo_v2_flash" else pairs
        pairs = settings.whole("swa_num_key_value_heads", twice, least=1)
        heads = settings.whole("swa_num_attention_heads", heads, least=1)
        width = settings.whole("swa_head_dim", width, least=1)
        value = settings.whole("swa_v_head_dim", value, least=1)
    elif wide := settings.whole("global_head_dim", 0):  # Gemma 4
        width = value = wide
        if settings.flag("attention_k_eq_v"):
            pairs = settings.whole("num_global_key_value_heads", pairs, least=1)
    return Attention(heads, pairs, width, value, window=_window(settings, layer))


def _window(settings: HfConfig, layer: int) -> int | None:
    """Tokens that a layer looks back; None for all."""
    window = settings.whole("sliding_window", 0)
    return window if window and has_window(settings, layer) else None


def has_window(settings: HfConfig, layer: int) -> bool:
    """Whether a layer is one of those with a window, in whichever of the words a config uses.

    They are: a list (`layer_types`; MiMo's `hybrid_layer_pattern`, 1 for a window); a pattern such
    as "LLLG" or every how many layers one sees all tokens (`sliding_window_pattern`); from or up to
    which layer (`max_window_layers`); or nothing, where the family decides (`WINDOWED`).
    """
    layers = settings.whole("num_hidden_layers", layer + 1, least=1)
    kind = str(settings.raw("model_type"))
    if kinds := settings.items("layer_types", str, layer + 1):
        is_last = kind == "gemma4_text" and layer == layers - 1  # full, whatever is listed
        return not is_last and ("sliding" in kinds[layer] or "chunked" in kinds[layer])
    if (flags := settings.items("hybrid_layer_pattern", int, layer + 1)) is not None:
        return bool(flags[layer])
    if not settings.flag("use_sliding_window", kind not in ("qwen2_moe", "qwen3_moe")):
        return False
    if kind == "cohere2_moe":  # its pattern begins after the dense layers, which see all tokens
        layer -= settings.whole("first_k_dense_replace", 0)
        if layer < 0:
            return False
    if isinstance(pattern := settings.raw("sliding_window_pattern"), str) and pattern:
        return pattern[layer % len(pattern)] == "L"
    if every := settings.whole("sliding_window_pattern", 0):
        return (layer + 1) % every != 0
    if kind == "dots1":
        return layer >= settings.whole("max_window_layers", 62)
    if kind == "qwen2_moe" and layer >= settings.whole("max_window_layers", 28):
        return False
    return kind in WINDOWED and WINDOWED[kind](layer, layers)
