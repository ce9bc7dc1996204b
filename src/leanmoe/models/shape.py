"""What a mixture-of-experts model is, read from its config.json alone: no torch, no weights.

Letters: E experts, k experts a token, B tokens in a forward step, G groups, D hidden width.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from leanmoe.core.errors import LeanMoeError
from leanmoe.models.attention import CACHE_BYTES, Attention, attends, attention_of
from leanmoe.models.families import FAMILIES, Router, family_of
from leanmoe.models.family import REFUSED, Family, not_loadable_reason
from leanmoe.models.hf_config import (
    FILE,
    HfConfig,
    config_path,
    has_experts,
    language_part,
    read_config,
)
from leanmoe.models.modules import modules
from leanmoe.models.parameters import (
    Parameters,
    count_parameters,
    dense_width,
    layer_count,
    shared_experts,
)
from leanmoe.models.shards import from_shards
from leanmoe.models.weight_format import Storage, storage

__all__ = ["MoEShape", "Parameters", "distinct_grouped", "distinct_uniform", "read_shape"]


@dataclass(frozen=True)
class MoEShape:
    """Layers, experts, widths, routing and weights of a model."""

    architecture: str
    model_type: str
    layers: int
    moe_layers: tuple[int, ...]
    """Which decoder layers have routed experts that a router ranks: those a plan has rules for."""
    hash_layers: tuple[int, ...]
    """Which ones have experts that a table picks by token id; they stay as trained."""
    experts: int
    """Experts a router chooses among, those that are the identity included."""
    top_k: int
    shared_experts: int
    hidden: int
    expert_width: int
    shared_width: int
    """Width of all shared experts, added up."""
    dense_width: int
    vocabulary: int
    router: Router
    parameters: Parameters
    storage: Storage
    not_runnable: str | None
    """Why no plan can run on the model; None where one can."""
    attention: tuple[tuple[Attention, int], ...] = field(compare=False)
    """Kinds of attention layers and how many there are of each; linear mixers cache nothing.

    Windows are those that the config.json lists: what a family assumes beside it is not known."""
    matrices: int
    """Matrices of an expert: 3 with a gate, 2 without."""
    not_loadable: str | None = field(compare=False)
    """Why Transformers cannot load it as text; engines may. None where it can."""
    name: str = field(compare=False)
    """What the model was asked for by; the architecture where it was not by a name."""

    def fingerprint(self) -> Fingerprint:
        """What a plan for this model is tied to; raises LeanMoeError where none can run."""
        if self.not_runnable is not None:
            raise LeanMoeError(
                f"no plan can run on {self.model_type}: {self.not_runnable} "
                "(leanmoe inspect still works)"
            )
        return Fingerprint(
            self.architecture, self.layers, len(self.moe_layers), self.experts, self.top_k
        )

    @property
    def routed_layers(self) -> int:
        """Layers with routed experts, however these are picked."""
        return len(self.moe_layers) + len(self.hash_layers)

    @property
    def weighted_experts(self) -> int:
        """Experts of a layer that have weights: all but the identities."""
        return self.experts - self.router.zero_experts

    @property
    def expert_parameters(self) -> int:
        """Weights of one routed expert."""
        return self.parameters.expert

    @property
    def expert_bytes(self) -> float:
        """Bytes read when one routed expert is active."""
        return self.parameters.expert * self.storage.expert_bytes

    def total_parameters(self) -> int:
        """All weights."""
        return self.parameters.always + self._routed(self.experts)

    def active_parameters(self) -> int:
        """Weights one token uses, embedding and head included as most model cards count them.

        Where some experts are the identity: on average, all of them chosen alike.
        """
        return self.parameters.always + self._routed(self.top_k)

    def always_bytes(self) -> float:
        """Bytes of weights every decode step reads, whatever its tokens choose.

        The embedding table is looked up, not read, except where it is the head as well.
        """
        each, stored = self.parameters, self.storage
        split = each.mixers * stored.mixer_bytes + each.dense * stored.dense_bytes
        split += each.shared * stored.shared_bytes + each.routers * stored.router_bytes
        head = each.head * stored.head_bytes or each.embedding * stored.embedding_bytes
        return split + each.norms * stored.plain_bytes + head

    def total_bytes(self) -> float:
        """Bytes of all weights as they are stored: a checkpoint of the decoder alone.

        What a checkpoint holds beside it (vision, layers that predict ahead) is not counted.
        """
        table = self.parameters.embedding * self.storage.embedding_bytes
        table *= self.parameters.head > 0  # a table that is the head too counts there
        experts = self.routed_layers * self.weighted_experts
        return self.always_bytes() + table + experts * self.expert_bytes

    def decode_bytes(self, distinct: float, trained: float | None = None) -> float:
        """Bytes of weights a decode step reads when each MoE layer activates `distinct` experts.

        Layers that no plan changes activate `trained`, or as many. KV cache and so on: not counted.
        """
        others = distinct if trained is None else trained
        experts = len(self.moe_layers) * distinct + len(self.hash_layers) * others
        weighted = experts * self.weighted_experts / self.experts
        return self.always_bytes() + weighted * self.expert_bytes

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

    def _routed(self, experts: int) -> int:
        """Weights of so many routed experts in each layer, identities among them in proportion."""
        weighted = self.routed_layers * experts * self.weighted_experts // self.experts
        return weighted * self.parameters.expert


def distinct_uniform(experts: int, top_k: float, tokens: int) -> float:
    """Expected distinct experts of a step whose tokens choose independently, all alike.

    E(1 - (1 - k/E)^B): each expert is among a token's k with chance k/E. Group-limited routing
    over equally likely groups does not change that chance, so this is exact for it too.
    """
    return float(experts * (1 - (1 - top_k / experts) ** tokens))


def distinct_grouped(experts: int, top_k: int, tokens: int, groups: int, used: int) -> float:
    """Expected distinct experts when the tokens of a step all use the same `used` of `groups`.

    What makes group-limited routing activate fewer experts than `distinct_uniform` is not the limit
    but tokens that agree on their groups; this is full agreement, the lower end.
    """
    if not 1 <= used <= groups or experts % groups:
        raise LeanMoeError(f"{used} of {groups} groups of {experts} experts is not possible")
    reachable = experts * used // groups
    if top_k > reachable:
        raise LeanMoeError(f"top_k {top_k} is above the {reachable} experts of {used} groups")
    return distinct_uniform(reachable, top_k, tokens)


def read_shape(source: str | Path | Mapping[str, Any], name: str | None = None) -> MoEShape:
    """The shape of a model folder, a config.json, a hub name, the word "reference" or a config.

    A hub name is looked up in the local cache first, then on the network. Where a checkpoint's
    shards lie beside its config.json, their headers say how weights are stored. Raises LeanMoeError
    for what is not a mixture-of-experts model of a known family, and for values out of range.
    """
    if isinstance(source, Mapping):
        return _shape_of(source, name)
    shape = _shape_of(read_config(str(source)), name or str(source))
    experts = shape.routed_layers * shape.weighted_experts
    folder = config_path(str(source)).parent
    stored = from_shards(shape.storage, folder, shape.parameters, shape.layers, experts)
    return replace(shape, storage=stored)


def _shape_of(config: Mapping[str, Any], name: str | None) -> MoEShape:
    values = language_part(config)
    model_type = values.get("model_type")
    if (
        model_type not in tuple(FAMILIES) and f"{model_type}_text" in FAMILIES
    ):  # the part has no type
        values["model_type"] = model_type = f"{model_type}_text"
    is_listed = model_type is None or model_type in (*FAMILIES, *REFUSED)
    if not is_listed and not has_experts(config):
        raise LeanMoeError(
            f"model_type {model_type!r} has no routed experts in its {FILE}: "
            "it is not a mixture-of-experts model"
        )
    family = family_of(model_type)
    told = {name: value for name, value in values.items() if name not in family.ignores}
    settings = HfConfig(told, family.defaults)
    layers = layer_count(settings, family)
    experts, top_k = _experts(settings, str(model_type))
    routed_layers = _moe_layers(settings, layers)
    hash_layers = _hash_layers(settings, routed_layers)
    router = _router(settings, family, experts, top_k)
    width = settings.whole(family.width, least=1)
    shared, shared_width = shared_experts(settings, family, width)
    return MoEShape(
        architecture=_architecture(settings),
        model_type=str(model_type),
        layers=layers,
        moe_layers=tuple(n for n in routed_layers if n not in hash_layers),
        hash_layers=hash_layers,
        experts=experts + router.zero_experts,
        top_k=top_k,
        shared_experts=shared,
        hidden=settings.whole("hidden_size", least=1),
        expert_width=width,
        shared_width=shared_width,
        dense_width=dense_width(settings, family),
        vocabulary=settings.whole("vocab_size", least=1),
        router=router,
        parameters=count_parameters(settings, family, routed_layers, hash_layers),
        storage=storage(settings, modules(settings, family, routed_layers)),
        not_runnable=family.not_runnable,
        attention=_attention(settings, layers, family.sublayers),
        matrices=family.matrices,
        not_loadable=not_loadable_reason(config, str(model_type)),
        name=name or _architecture(settings),
    )


def _architecture(settings: HfConfig) -> str:
    names = settings.items("architectures", str)
    return str(names[0]) if names else str(settings.raw("model_type"))


def _attention(settings: HfConfig, layers: int, each: int) -> tuple[tuple[Attention, int], ...]:
    kinds = Counter(attention_of(settings, n) for n in range(layers) if attends(settings, n))
    return tuple((kind, count * each) for kind, count in kinds.items())


def _experts(settings: HfConfig, model_type: str) -> tuple[int, int]:
    is_said = settings.named("num_experts") in settings.values or model_type == "gemma4_text"
    if is_said and settings.raw("num_experts") in (None, 0, 1):
        raise LeanMoeError(
            f"{model_type} with {settings.named('num_experts')} "
            f"{settings.raw('num_experts')!r} is not a mixture-of-experts model"
        )
    experts = settings.whole("num_experts", least=2)
    top_k = settings.whole("num_experts_per_tok", least=1)
    if top_k > experts:
        raise LeanMoeError(
            f"{FILE}: {settings.named('num_experts_per_tok')} is {top_k}: "
            f"it must be at most {experts}, the number of experts"
        )
    return experts, top_k


def _router(settings: HfConfig, family: Family, experts: int, top_k: int) -> Router:
    router = family.router(settings)
    groups, used = router.groups, router.groups_used
    if experts % groups or used > groups:
        raise LeanMoeError(
            f"{FILE}: {used} of {groups} groups (topk_group of n_group) of {experts} experts "
            "is not possible"
        )
    if top_k > experts // groups * used:
        raise LeanMoeError(
            f"{FILE}: {settings.named('num_experts_per_tok')} is {top_k}: "
            f"it must be at most {experts // groups * used}, the experts of {used} groups"
        )
    return router


def _moe_layers(settings: HfConfig, layers: int) -> tuple[int, ...]:
    """Which layers have routed experts, in whichever of the ways to say so the config uses."""
    kinds = settings.items("mlp_layer_types", str, layers)
    frequency = settings.raw("moe_layer_freq")
    counts = settings.raw("num_experts")
    if kinds is not None:
        moe = tuple(n for n in range(layers) if kinds[n] != "dense")
    elif isinstance(counts, list) and len(counts) == layers:
        moe = tuple(n for n in range(layers) if counts[n])
    elif (listed := settings.raw("moe_layers_enum")) is not None:  # Step: a list, or "3,4,5"
        words = listed.split(",") if isinstance(listed, str) else listed
        if not isinstance(words, list) or not all(str(word).strip().isdigit() for word in words):
            raise LeanMoeError(f"{FILE}: moe_layers_enum is {listed!r}: it must be layer numbers")
        numbers = set(map(int, words))
        moe = tuple(n for n in range(layers) if n in numbers)
    elif isinstance(frequency, list):
        flags = settings.items("moe_layer_freq", int, layers) or ()
        moe = tuple(n for n in range(layers) if flags[n])
    elif "moe" in (blocks := settings.items("layer_types", str) or ()):
        moe = tuple(n for n in range(layers) if blocks[n] == "moe")
    else:
        moe = tuple(n for n in range(layers) if _is_moe(settings, n, layers))
    if not moe:
        raise LeanMoeError("no decoder layer has routed experts: not a mixture-of-experts model")
    return moe


def _hash_layers(settings: HfConfig, moe_layers: tuple[int, ...]) -> tuple[int, ...]:
    """Those of the layers with experts in which a table picks them (DeepSeek-V4's first ones)."""
    if kinds := settings.items("mlp_layer_types", str):
        return tuple(n for n in moe_layers if kinds[n] == "hash_moe")
    return tuple(n for n in moe_layers if n < settings.whole("num_hash_layers", 0))


def _is_moe(settings: HfConfig, layer: int, layers: int) -> bool:
    last = settings.raw("moe_layer_end_index")
    after = layers if last in (None, -1) else settings.whole("moe_layer_end_index") + 1
    if not settings.whole("first_k_dense_replace", 0) <= layer < after:
        return False
    if layer in (settings.items("mlp_only_layers", int) or ()):
        return False
    step = settings.whole("decoder_sparse_step", settings.whole("moe_layer_interval", 1, 1), 1)
    period = settings.whole("expert_layer_period", settings.whole("moe_layer_freq", 1, 1), 1)
    return (layer + 1) % step == 0 and layer % period == settings.whole("expert_layer_offset", 0)


HEAD = re.compile(r"(Sparse|Thinker|Text)?For[A-Z]\w*$")
"""What a class name says of the model's head and of what is around the language model."""
SAME = {"hunyuanv1moe": "hunyuanmoev1", "minimaxm3vl": "minimaxm3"}
"""Model types whose classes are called otherwise."""


@dataclass(frozen=True)
class Fingerprint:
    """The model a plan was made for; a plan is refused on any other."""

    architecture: str
    layers: int
    moe_layers: int
    experts: int
    top_k: int

    def difference(self, other: Fingerprint) -> str | None:
        """The first field in which `other` is another model; None where it is the same one.

        A multimodal model and its language model loaded by itself have classes of their own
        (Qwen3_5MoeForConditionalGeneration, Qwen3_5MoeForCausalLM), and a config.json without
        `architectures` has its model type here: these are the same model.
        """
        for name, value in asdict(self).items():
            theirs = getattr(other, name)
            if name == "architecture":
                value, theirs = _language_model(value), _language_model(theirs)
            if value != theirs:
                return name
        return None


def _language_model(architecture: str) -> str:
    """The name that a class, its relatives with other heads and the model type have in common."""
    name = HEAD.sub("", architecture).lower().replace("_", "").replace("-", "")
    name = name.removesuffix("text")
    return SAME.get(name, name)
