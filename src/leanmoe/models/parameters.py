"""How many weights a model has, by what they are for, from its settings alone. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from leanmoe.models.family import Family
from leanmoe.models.hf_config import HfConfig

MOST_LAYERS = 10_000
"""Each is looked at; no model has a tenth as many."""


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


def layer_count(settings: HfConfig, family: Family) -> int:
    """Decoder layers: where a layer is a mixer or experts, as many as are listed."""
    if family.single and (kinds := settings.items("layer_types", str)) is not None:
        return len(kinds)
    return settings.whole("num_hidden_layers", least=1, most=MOST_LAYERS)


def dense_width(settings: HfConfig, family: Family) -> int:
    """Width of a dense layer; 0 where there is none."""
    own = settings.whole(family.dense_width, 0)
    return own or settings.whole("intermediate_size", 0)


def shared_experts(settings: HfConfig, family: Family, width: int) -> tuple[int, int]:
    """Number of shared experts, and the sum of their widths."""
    count = settings.whole("n_shared_experts", 0)
    if family.shared_width is None:
        return count, count * width
    own = settings.whole(family.shared_width, 0) * family.sublayers
    return (max(count, family.sublayers), own) if own else (0, 0)


def count_parameters(
    settings: HfConfig, family: Family, routed: tuple[int, ...], hashed: tuple[int, ...]
) -> Parameters:
    """Weights of a model whose layers `routed` have experts, in those `hashed` picked by a table.

    Raises LeanMoeError as the settings' readers do.
    """
    layers = layer_count(settings, family)
    hidden = settings.whole("hidden_size", least=1)
    width = settings.whole(family.width, least=1)
    router = family.router(settings)
    experts = settings.whole("num_experts", least=1) + router.zero_experts
    inner = settings.whole("moe_latent_size", hidden)
    table = settings.whole("vocab_size", least=1) * hidden
    shared = family.matrices * hidden * shared_experts(settings, family, width)[1]
    if family.shared_gate:
        shared += hidden
    if inner != hidden:
        shared += 2 * hidden * inner + inner * settings.flag("latent_moe_use_norm")
    terms = int(family.biases) + int(router.expert_scale is not None)
    biases = 0
    if router.ranking_bias is not None:
        biases = experts * (len(routed) - len(hashed))
    mixing, dense = tuple(range(layers)), layers - len(routed)
    if family.single and (kinds := settings.items("layer_types", str)) is not None:
        mixing = tuple(n for n in mixing if kinds[n] not in ("moe", "mlp"))
        dense = kinds.count("mlp")
    norms = layers * family.layer_norms * family.sublayers + len(routed) * family.moe_norms + 1
    norms *= hidden * (1 + int(family.norm_biases))
    norms += 0 if family.further is None else family.further(settings)
    return Parameters(
        embedding=table,
        head=0 if settings.flag("tie_word_embeddings") else table,
        mixers=sum(family.mixer(settings, layer) for layer in mixing) * family.sublayers,
        dense=dense * family.matrices * hidden * dense_width(settings, family),
        shared=len(routed) * shared,
        routers=len(routed) * experts * (hidden + terms) + biases,
        norms=norms,
        expert=family.matrices * inner * width + (2 * width + hidden) * int(family.biases),
    )
