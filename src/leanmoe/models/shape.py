"""What a mixture-of-experts model is, read from its config.json alone: no torch, no weights.

Letters: E experts, k experts a token, B tokens in a forward step, G groups, D hidden width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from leanmoe.core.errors import LeanMoeError
from leanmoe.models.attention import CACHE_BYTES, Attention, attends, attention_of
from leanmoe.models.families import FAMILIES, Router, family_of
from leanmoe.models.family import REFUSED, Family
from leanmoe.models.fingerprint import Fingerprint
from leanmoe.models.hf_config import FILE, HfConfig, language_part, read_config
from leanmoe.models.modules import modules
from leanmoe.models.weight_format import Storage, storage

__all__ = ["MoEShape", "Parameters", "distinct_grouped", "distinct_uniform", "read_shape"]


@dataclass(frozen=True)
class Parameters:
    """Weights of a model, by what they are for; one routed expert's are `expert`.

    Only the language model's decoder layers count: no vision or audio part, and none of the
    further layers that predict several tokens ahead.
    """

    embedding: int
    head: int
    """0 where the head is the embedding."""
    mixers: int
    """Attention, and what stands in its place in some layers."""
    dense: int
    shared: int
    routers: int
    norms: int
    """Norms, and what weights stand in no layer beside embedding and head."""
    expert: int

    @property
    def always(self) -> int:
        """All weights but the routed experts'."""
        return (
            self.embedding
            + self.head
            + self.mixers
            + self.dense
            + self.shared
            + self.routers
            + self.norms
        )


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
    def weight_bytes(self) -> float:
        """Bytes of one routed-expert weight as stored."""
        return self.storage.expert_bytes

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

    A hub name is looked up in the local cache first, then on the network. Raises LeanMoeError
    for what is not a mixture-of-experts model of a known family, and for values out of range.
    """
    config = source if isinstance(source, Mapping) else read_config(str(source))
    values = language_part(config)
    model_type = values.get("model_type")
    if model_type not in (*FAMILIES, *REFUSED) and HfConfig(values).raw("num_experts") in (
        None,
        0,
        1,
    ):
        raise LeanMoeError(
            f"model_type {model_type!r} has no routed experts in its {FILE}: "
            "it is not a mixture-of-experts model"
        )
    family = family_of(model_type)
    told = {name: value for name, value in values.items() if name not in family.ignores}
    settings = HfConfig(told, family.defaults)
    layers = _layers(settings, family)
    experts, top_k = _experts(settings, str(model_type))
    routed_layers = _moe_layers(settings, layers)
    hash_layers = _hash_layers(settings, routed_layers)
    router = _router(settings, family, experts, top_k)
    width = settings.whole(family.width, least=1)
    shared, shared_width = _shared(settings, family, width)
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
        dense_width=_dense_width(settings, family),
        vocabulary=settings.whole("vocab_size", least=1),
        router=router,
        parameters=_parameters(settings, family, layers, routed_layers),
        storage=storage(settings, modules(settings, family, routed_layers)),
        not_runnable=family.not_runnable,
        attention=_attention(settings, layers, family.sublayers),
        matrices=family.matrices,
        name=name or (_architecture(settings) if isinstance(source, Mapping) else str(source)),
    )


def _architecture(settings: HfConfig) -> str:
    names = settings.items("architectures", str)
    return str(names[0]) if names else str(settings.raw("model_type"))


def _attention(settings: HfConfig, layers: int, each: int) -> tuple[tuple[Attention, int], ...]:
    kinds = Counter(attention_of(settings, n) for n in range(layers) if attends(settings, n))
    return tuple((kind, count * each) for kind, count in kinds.items())


def _layers(settings: HfConfig, family: Family) -> int:
    if family.single and (kinds := settings.items("layer_types", str)) is not None:
        return len(kinds)
    return settings.whole("num_hidden_layers", least=1)


def _experts(settings: HfConfig, model_type: str) -> tuple[int, int]:
    if settings.raw("num_experts") in (None, 0, 1):
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
    if kinds is not None:
        moe = tuple(n for n in range(layers) if kinds[n] != "dense")
    elif (listed := settings.raw("moe_layers_enum")) is not None:  # Step: a list, or "3,4,5"
        numbers = set(map(int, listed.split(",") if isinstance(listed, str) else listed))
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


def _dense_width(settings: HfConfig, family: Family) -> int:
    own = settings.whole(family.dense_width, 0)
    return own or settings.whole("intermediate_size", 0)


def _shared(settings: HfConfig, family: Family, width: int) -> tuple[int, int]:
    """Number of shared experts, and the sum of their widths."""
    count = settings.whole("n_shared_experts", 0)
    if family.shared_width is None:
        return count, count * width
    own = settings.whole(family.shared_width, 0) * family.sublayers
    return (max(count, family.sublayers), own) if own else (0, 0)


def _parameters(
    settings: HfConfig, family: Family, layers: int, moe_layers: tuple[int, ...]
) -> Parameters:
    hidden = settings.whole("hidden_size", least=1)
    width = settings.whole(family.width, least=1)
    router = family.router(settings)
    experts = settings.whole("num_experts", least=1) + router.zero_experts
    inner = settings.whole("moe_latent_size", hidden)
    table = settings.whole("vocab_size", least=1) * hidden
    shared = family.matrices * hidden * _shared(settings, family, width)[1]
    if family.shared_gate:
        shared += hidden
    if inner != hidden:
        shared += 2 * hidden * inner + inner * settings.flag("latent_moe_use_norm")
    terms = int(family.biases) + int(router.expert_scale is not None)
    biases = 0
    if router.ranking_bias is not None:
        biases = experts * (len(moe_layers) - len(_hash_layers(settings, moe_layers)))
    mixing, dense = tuple(range(layers)), layers - len(moe_layers)
    if family.single and (kinds := settings.items("layer_types", str)) is not None:
        mixing = tuple(n for n in mixing if kinds[n] not in ("moe", "mlp"))
        dense = kinds.count("mlp")
    norms = layers * family.layer_norms * family.sublayers + len(moe_layers) * family.moe_norms + 1
    norms *= hidden * (1 + int(family.norm_biases))
    norms += 0 if family.further is None else family.further(settings)
    return Parameters(
        embedding=table,
        head=0 if settings.flag("tie_word_embeddings") else table,
        mixers=sum(family.mixer(settings, layer) for layer in mixing) * family.sublayers,
        dense=dense * family.matrices * hidden * _dense_width(settings, family),
        shared=len(moe_layers) * shared,
        routers=len(moe_layers) * experts * (hidden + terms) + biases,
        norms=norms,
        expert=family.matrices * inner * width + (2 * width + hidden) * int(family.biases),
    )
