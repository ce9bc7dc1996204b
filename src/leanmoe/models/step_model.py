"""What a model computes in a step beside its experts, read from its config.json. Needs no torch.

Letters: D hidden width, H heads, W head width, C tokens of context.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leanmoe.core.errors import LeanMoeError
from leanmoe.models.attention_params import attends
from leanmoe.models.families import family_of
from leanmoe.models.hf_config import HfConfig, language_part, read_config
from leanmoe.models.shape import MoEShape, read_shape

CACHE_BYTES = 2.0
"""Of a value in the KV cache: bf16, what engines do unless told otherwise."""
KERNEL_FORMATS: Mapping[str, str] = {
    "bfloat16": "bfloat16",
    "float16": "bfloat16",
    "fp8": "fp8_block",
    "mxfp4": "w4a16_mxfp4",
}
"""Formats of stored experts whose kernels were measured, and the tables' names."""
ALTERNATE = ("gpt_oss",)
"""Model types whose layers have a window in turn where the config lists no layer types."""


@dataclass(frozen=True)
class Attention:
    """Attention of one kind of layer."""

    heads: int
    pairs: int
    """Key-value heads."""
    width: int
    """Of queries and keys."""
    value_width: int
    latent: int = 0
    """Width of what multi-head latent attention caches, without rotary part; 0 for none."""
    rotary: int = 0
    """Of latent attention: width of the shared rotary key."""
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


@dataclass(frozen=True)
class Model:
    """A model as the cost of a step needs it."""

    name: str
    shape: MoEShape
    attention: tuple[tuple[Attention, int], ...]
    """Kinds of attention layers and how many there are of each; linear mixers cache nothing."""
    matrices: int
    """Of an expert: 3 with a gate, 2 without."""

    @property
    def moe_layers(self) -> int:
        """Layers with routed experts."""
        return len(self.shape.moe_layers)

    def cached_bytes(self, context: float, tensor: int = 1) -> float:
        """Bytes of KV cache of one sequence with `context` tokens on one of `tensor` GPUs."""
        return sum(
            count * kind.cached_width(tensor) * kind.reach(context) * CACHE_BYTES
            for kind, count in self.attention
        )

    @property
    def copied_weights(self) -> int:
        """Attention's weights that every GPU of tensor parallelism holds whole."""
        return sum(count * kind.copied for kind, count in self.attention)

    @property
    def dtype(self) -> str:
        """The format of the kernel that computes the experts: bf16's where none is known."""
        return KERNEL_FORMATS.get(self.shape.storage.name, "bfloat16")

    @property
    def is_as_if(self) -> bool:
        """Whether no kernel for the experts' format is known, and bf16's stands in for it."""
        return self.shape.storage.name not in KERNEL_FORMATS


def read_model(source: str | Path | Mapping[str, Any], name: str | None = None) -> Model:
    """A model from what `read_shape` takes; raises LeanMoeError for what is not one."""
    config = source if isinstance(source, Mapping) else read_config(str(source))
    shape = read_shape(config)
    values = language_part(config)
    family = family_of(values.get("model_type"))
    settings = HfConfig(values, family.defaults)
    kinds: dict[Attention, int] = {}
    for layer in range(shape.layers):
        if _attends(settings, layer):
            kind = _attention(settings, layer)
            kinds[kind] = kinds.get(kind, 0) + 1
    if name is None:
        name = shape.architecture if isinstance(source, Mapping) else str(source)
    return Model(name, shape, tuple(kinds.items()), family.matrices)


def _attends(settings: HfConfig, layer: int) -> bool:
    kinds = settings.items("layer_types", str)
    if kinds and "moe" in kinds:  # a layer is a mixer or experts (Nemotron-H)
        return bool(kinds[layer] == "full_attention")
    return attends(settings, layer)


def _attention(settings: HfConfig, layer: int) -> Attention:
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
    if settings.raw("model_type") in ALTERNATE:
        return window if layer % 2 == 0 else None
    return None


def require_divides(what: str, whole: int, by: int, flag: str) -> None:
    """Raises LeanMoeError unless `by` divides `whole`."""
    if whole % by:
        allowed = [n for n in range(1, whole + 1) if whole % n == 0]
        raise LeanMoeError(
            f"{flag} {by} does not divide {whole} {what}: it must be one of "
            f"{', '.join(map(str, allowed[:12]))}"
        )
