"""The weight matrices of a decoder, by the names that checkpoints give them: no weights, no torch.

Quantisation settings speak of modules by name; what they say is decided for these.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import translate
from types import MappingProxyType
from typing import Literal

from leanmoe.core.errors import LeanMoeError
from leanmoe.models.attention import attends, attention_of
from leanmoe.models.family import Family
from leanmoe.models.hf_config import HfConfig
from leanmoe.models.parameters import layer_count

Part = Literal["expert", "mixers", "dense", "shared", "routers", "head", "embedding"]
PREFIXES = ("model", "model.language_model", "language_model.model", "backbone")
"""What stands before `layers` in a checkpoint of a language model, or of a model around one."""
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
NUMBERED = ("w1", "w3", "w2")
BLOCKS: Mapping[str, tuple[str, tuple[str, ...]]] = MappingProxyType(
    {
        "mixtral": ("block_sparse_moe", NUMBERED),
        "phimoe": ("block_sparse_moe", NUMBERED),
        "minimax": ("block_sparse_moe", NUMBERED),
        "minimax_m2": ("block_sparse_moe", NUMBERED),
        "minimax_m3_vl_text": ("block_sparse_moe", NUMBERED),
        "kimi_linear": ("block_sparse_moe", NUMBERED),
        "granitemoe": ("block_sparse_moe", PROJECTIONS),
        "granitemoeshared": ("block_sparse_moe", PROJECTIONS),
        "granitemoehybrid": ("block_sparse_moe", PROJECTIONS),
        "jamba": ("feed_forward", PROJECTIONS),
        "lfm2_moe": ("feed_forward", NUMBERED),
        "nemotron_h": ("mixer", PROJECTIONS),
        "step3p5": ("moe", PROJECTIONS),
    }
)
"""The MoE block's name and its matrices', by model type, where these are not mlp.gate_proj, ..."""
SHARED = ("shared_experts", "shared_expert", "shared_mlp")
REST = 0.01
"""The share of a mixer's weights up to which what has no name here is norms and biases."""
DELTA_NET = ("linear_attn.in_proj_qkvz", "linear_attn.in_proj_qkv", "linear_attn.out_proj")
OTHER_MIXERS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "qwen3_next": DELTA_NET,
        "qwen3_5_moe_text": DELTA_NET,
        "jamba": ("mamba.in_proj", "mamba.out_proj"),
        "granitemoehybrid": ("mamba.in_proj", "mamba.out_proj"),
        "nemotron_h": ("mixer.in_proj", "mixer.out_proj"),
        "lfm2_moe": ("conv.in_proj", "conv.out_proj"),
    }
)
"""Projections of what stands in attention's place, by model type, where these are not self_attn's.

Settings that speak of attention are not about these.
"""
STACKED = ("gpt_oss", "qwen3_vl_moe_text", "qwen3_omni_moe_text", "qwen3_5_moe_text")
"""Model types whose checkpoints may keep a layer's experts in two tensors."""


@dataclass(frozen=True)
class Module:
    """A weight matrix, under each of the names that it may have; without a name: norms, biases."""

    part: Part
    names: tuple[str, ...]
    weights: int


class UnknownFormatError(LeanMoeError):
    """Quantisation settings that are not understood: bytes of weights cannot be told from them."""


Matches = Callable[[Module], bool]
PATTERN = re.compile(r"[*+?^$()\[\]{}|\\]")
"""A name with one of these is a pattern."""


def modules(settings: HfConfig, family: Family, moe_layers: tuple[int, ...]) -> Iterator[Module]:
    """Every matrix of each decoder layer, and embedding and head; one expert stands for a layer's.

    Raises LeanMoeError as the settings' readers do.
    """
    hidden, vocabulary = settings.whole("hidden_size", least=1), settings.whole("vocab_size")
    tables = {"embedding": "embed_tokens", "head": "lm_head"}
    yield Module("embedding", _under(tables["embedding"], PREFIXES), hidden * vocabulary)
    heads = ("lm_head", "language_model.lm_head")
    yield Module("head", heads, hidden * vocabulary)
    # Nemotron-H's layers are a mixer, experts or dense; elsewhere each is a mixer and what follows.
    kinds = settings.items("layer_types", str) if family.single else None
    for layer in range(layer_count(settings, family)):
        if kinds is None or kinds[layer] not in ("moe", "mlp"):
            yield from _mixer(settings, layer, family.mixer(settings, layer))
        if kinds is None or kinds[layer] in ("moe", "mlp"):
            yield from _feed_forward(settings, layer, layer in moe_layers)


def _under(name: str, prefixes: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{prefix}.{name}" for prefix in prefixes)


def _of_layer(layer: int, *names: str) -> tuple[str, ...]:
    prefixes = tuple(f"{prefix}.layers.{layer}" for prefix in PREFIXES)
    return tuple(each for name in names for each in _under(name, prefixes))


def _feed_forward(settings: HfConfig, layer: int, has_experts: bool) -> Iterator[Module]:
    """The matrices of one expert, of the shared ones and of the router, or of a dense layer.

    Their weights are shares of the part's: each of three, or two, is as large.
    """
    kind = str(settings.raw("model_type"))
    block, names = BLOCKS.get(kind, ("mlp", PROJECTIONS))
    if not has_experts:
        for name in names:
            known = {f"mlp.{name}", f"feed_forward.{name}", f"{block}.{name}"}
            yield Module("dense", _of_layer(layer, *sorted(known)), 1)
        return
    yield Module("routers", _of_layer(layer, f"{block}.gate", f"{block}.router"), 1)
    for name in names:
        routed = [f"experts.0.{name}"] + ([name] if block == "moe" else [])
        if kind in STACKED:
            routed.append("experts." + ("down_proj" if name == "down_proj" else "gate_up_proj"))
        yield Module("expert", _of_layer(layer, *(f"{block}.{each}" for each in routed)), 1)
        shared = [f"{block}.{each}.{name}" for each in SHARED]
        yield Module("shared", _of_layer(layer, *shared, f"share_expert.{name}"), 1)


def _mixer(settings: HfConfig, layer: int, weights: int) -> Iterator[Module]:
    """The projections of a layer's attention, or of what stands in its place."""
    sizes = _attention(settings, layer) if attends(settings, layer) else {}
    rest = weights - sum(sizes.values())
    if not sizes or rest < 0:
        names = tuple(f"self_attn.{name}" for name in sizes) or OTHER_MIXERS.get(
            str(settings.raw("model_type")), ("self_attn.q_proj", "self_attn.o_proj")
        )
        yield Module("mixers", _of_layer(layer, *names), weights)
        return
    for name, size in sizes.items():
        yield Module("mixers", _of_layer(layer, f"self_attn.{name}", f"attention.{name}"), size)
    named = rest > REST * weights
    yield Module("mixers", _of_layer(layer, "self_attn.indexer") if named else (), rest)


def _attention(settings: HfConfig, layer: int) -> dict[str, int]:
    """Weights of each projection of attention, latent or not."""
    kind, hidden = attention_of(settings, layer), settings.whole("hidden_size", least=1)
    queries, values = kind.heads * kind.width, kind.heads * kind.value_width
    if not settings.whole("kv_lora_rank", 0):
        return {
            "q_proj": hidden * queries,
            "k_proj": hidden * kind.pairs * kind.width,
            "v_proj": hidden * kind.pairs * kind.value_width,
            "o_proj": values * hidden,
        }
    rank = settings.whole("q_lora_rank", 0)
    sizes = {"q_a_proj": hidden * rank, "q_b_proj": rank * queries}
    return {
        **(sizes if rank else {"q_proj": hidden * queries}),
        "kv_a_proj_with_mqa": hidden * (kind.latent + kind.rotary),
        "kv_b_proj": kind.latent * kind.heads * (kind.width - kind.rotary + kind.value_width),
        "o_proj": values * hidden,
    }


def named(patterns: tuple[str, ...]) -> Matches:
    """Transformers' rule: a name, a part of it between dots, or a pattern that ends at a dot."""
    whole = frozenset(name for name in patterns if not PATTERN.search(name))
    several = [compiled(rf"(?:{name})(?:\.|$)") for name in patterns if name not in whole]

    def matches(module: Module) -> bool:
        return any(
            not whole.isdisjoint(_between_dots(name)) or any(each.match(name) for each in several)
            for name in module.names
        )

    return matches


def _between_dots(name: str) -> set[str]:
    words = name.split(".")
    count = len(words)
    return {".".join(words[a:b]) for a in range(count) for b in range(a + 1, count + 1)}


def compiled(pattern: str) -> re.Pattern[str]:
    """A pattern of names; raises UnknownFormatError where it is none."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UnknownFormatError(f"{pattern!r} is no pattern of module names: {error}") from error


def within(patterns: tuple[str, ...]) -> Matches:
    """AutoAWQ's rule: a part of the name."""
    return lambda module: any(part in name for name in module.names for part in patterns)


def wildcards(patterns: tuple[str, ...]) -> Matches:
    """ModelOpt's and Quark's rule: the name with wildcards; a name leaves out what it contains.

    Quark's regular expressions begin with "re:".
    """
    texts = [name for name in patterns if "*" in name and not name.startswith("re:")]
    regular = [name.removeprefix("re:") for name in patterns if name.startswith("re:")]
    patterned = [*map(re.compile, map(translate, texts)), *map(compiled, regular)]
    plain = named(tuple({*patterns} - {*texts, *(f"re:{name}" for name in regular)}))
    return lambda module: (
        plain(module) or any(each.match(name) for name in module.names for each in patterned)
    )
