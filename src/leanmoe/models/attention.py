"""Attention of a decoder layer: its widths, its weights, and what a step reads and computes.

The counting functions give the parameters of one layer from a model's settings, as Transformers
builds it. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Callable
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
ALTERNATING = ("gpt_oss",)
"""Model types whose layers have a window in turn where the config lists no layer types."""


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
    copied: int = 0
    """Weights that tensor parallelism does not split: latent attention's down-projections."""

    def cached_width(self, tensor: int = 1) -> float:
        """Values cached for a token on one of `tensor` GPUs: a latent cache is not divided."""
        if self.latent:
            return float(self.latent + self.rotary)
        return (self.width + self.value_width) * max(1.0, self.pairs / tensor)

    def reach(self, context: float) -> float:
        """Tokens a query attends to, of `context`."""
        return context if self.window is None else min(context, float(self.window))

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


def attention_of(settings: HfConfig, layer: int) -> Attention:
    """The attention of a decoder layer that has one."""
    heads = settings.whole("num_attention_heads", least=1)
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
    return Attention(heads, pairs, width, value, window=_window(settings, layer))


def _window(settings: HfConfig, layer: int) -> int | None:
    window = settings.whole("sliding_window", 0)
    kinds = settings.items("layer_types", str)
    if not window:
        return None
    if kinds:
        return window if "sliding" in kinds[layer] else None
    if settings.raw("model_type") in ALTERNATING:
        return window if layer % 2 == 0 else None
    return None
