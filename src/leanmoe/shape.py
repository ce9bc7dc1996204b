"""What a mixture-of-experts model is, read from its config.json alone: no torch, no weights.

Letters: E experts, k experts a token, B tokens in a forward step, G groups.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leanmoe.errors import LeanMoeError
from leanmoe.families import Family, Router, family_of
from leanmoe.plan import Fingerprint
from leanmoe.storage import read_json

REFERENCE = "reference"
"""The name of the model that ships with leanmoe."""
EXPERTS_KEYS = ("num_local_experts", "num_experts", "n_routed_experts")
TOP_K_KEYS = ("num_experts_per_tok",)
"""What Transformers writes where a family's published config.json has a name of its own."""
STORED_BYTES = {"fp8": 1.0, "mxfp4": 0.53125, "float32": 4.0}
"""Bytes a routed expert's weight takes; mxfp4 is 4 bits and an 8-bit scale for each 32."""


@dataclass(frozen=True)
class Attention:
    """What is needed to count an attention layer's parameters; the ranks are MLA's."""

    heads: int
    key_value_heads: int
    head_width: int
    value_width: int
    query_rank: int | None = None
    key_value_rank: int | None = None
    rope_width: int = 0

    def parameters(self, hidden: int) -> int:
        """Weights of the projections (MLA: DeepSeek-V2 report, section 2.1)."""
        if self.key_value_rank is None:
            query = hidden * self.heads * self.head_width
            keys_values = 2 * hidden * self.key_value_heads * self.head_width
            return query + keys_values + self.heads * self.head_width * hidden
        queries = self.heads * self.head_width
        query = (
            hidden * queries
            if self.query_rank is None
            else self.query_rank * (hidden + queries + 1)
        )
        down = hidden * (self.key_value_rank + self.rope_width) + self.key_value_rank
        keys = self.head_width - self.rope_width
        up = self.key_value_rank * self.heads * (keys + self.value_width)
        return query + down + up + self.heads * self.value_width * hidden


@dataclass(frozen=True)
class MoEShape:
    """Layers, experts, widths and routing of a model."""

    architecture: str
    model_type: str
    layers: int
    moe_layers: tuple[int, ...]
    """Which decoder layers have routed experts."""
    experts: int
    top_k: int
    shared_experts: int
    hidden: int
    expert_width: int
    shared_width: int
    """Width of all shared experts together."""
    dense_width: int
    vocabulary: int
    tied_embeddings: bool
    attention: Attention
    router: Router
    weight_bytes: float

    def fingerprint(self) -> Fingerprint:
        """What a plan for this model is tied to."""
        return Fingerprint(
            self.architecture, self.layers, len(self.moe_layers), self.experts, self.top_k
        )

    @property
    def expert_parameters(self) -> int:
        """Weights of one routed expert: gate, up and down projection."""
        return 3 * self.hidden * self.expert_width

    @property
    def expert_bytes(self) -> float:
        """Bytes read when one routed expert is awake."""
        return self.expert_parameters * self.weight_bytes

    def total_parameters(self) -> int:
        """All weights."""
        return self._always_parameters() + self._embedding() + self._routed(self.experts)

    def active_parameters(self) -> int:
        """Weights one token uses, embeddings included as model cards count them."""
        return self._always_parameters() + self._embedding() + self._routed(self.top_k)

    def decode_bytes(self, distinct: float) -> float:
        """Bytes of weights a decode step reads when each MoE layer wakes `distinct` experts.

        The embedding table is looked up, not read; the KV cache is not counted.
        """
        always = self._always_parameters() * (2.0 if self.weight_bytes < 2 else self.weight_bytes)
        return always + len(self.moe_layers) * distinct * self.expert_bytes

    def _routed(self, experts: int) -> int:
        return len(self.moe_layers) * experts * self.expert_parameters

    def _embedding(self) -> int:
        return 0 if self.tied_embeddings else self.vocabulary * self.hidden

    def _always_parameters(self) -> int:
        """Head, attention, norms, routers, shared experts and dense layers."""
        each = self.attention.parameters(self.hidden) + 2 * self.hidden
        moe = len(self.moe_layers) * self.hidden * (self.experts + 3 * self.shared_width)
        dense = (self.layers - len(self.moe_layers)) * 3 * self.hidden * self.dense_width
        return self.vocabulary * self.hidden + self.layers * each + moe + dense + self.hidden


def distinct_uniform(experts: int, top_k: float, tokens: int) -> float:
    """Expected distinct experts of a step when every choice of k is equally likely.

    E(1 - (1 - k/E)^B).
    """
    return float(experts * (1 - (1 - top_k / experts) ** tokens))


def distinct_grouped(experts: int, top_k: int, tokens: int, groups: int, used: int) -> float:
    """Expected distinct experts when the tokens of a step all use the same `used` of `groups`.

    Group limits alone do not change `distinct_uniform`: while tokens choose independently, every
    expert is in a token's k with the same chance k/E. What wakes fewer experts is tokens that
    agree on their groups; this is full agreement, the lower end.
    """
    if not 1 <= used <= groups or experts % groups:
        raise LeanMoeError(f"{used} of {groups} groups of {experts} experts is not possible")
    reachable = experts * used // groups
    if top_k > reachable:
        raise LeanMoeError(f"top_k {top_k} is above the {reachable} experts of {used} groups")
    return distinct_uniform(reachable, top_k, tokens)


def read_shape(source: str | Path | Mapping[str, Any]) -> MoEShape:
    """The shape of a model folder, a config.json, a hub name, the word "reference" or a config.

    A hub name is looked up in the local cache first, then on the network. Raises LeanMoeError
    for what is not a mixture-of-experts model of a known family, and for values out of range.
    """
    config = dict(source) if isinstance(source, Mapping) else _read_config(str(source))
    if isinstance(config.get("text_config"), dict):
        config = {"architectures": config.get("architectures"), **config["text_config"]}
    family = family_of(config)
    return _shape(config, family)


def _read_config(source: str) -> dict[str, Any]:
    if source == REFERENCE:
        from leanmoe.reference import path

        source = str(path())
    local = Path(source)
    if local.is_dir():
        local = local / "config.json"
    if local.exists():
        config = read_json(local, "config")
    elif "/" in source and not source.startswith((".", "/", "~")) and source.count("/") == 1:
        config = _hub_config(source)
    else:
        raise LeanMoeError(f"model {source} does not exist: give a folder, a config.json or a name")
    if not isinstance(config, dict):
        raise LeanMoeError(f"config of {source} is not a JSON object")
    return config


def _hub_config(name: str) -> Any:
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise LeanMoeError(
            f"model {name} is not a local folder; to fetch it, pip install 'leanmoe[tune]'"
        ) from error
    try:
        return json.loads(Path(hf_hub_download(name, "config.json")).read_text(encoding="utf-8"))
    except Exception as error:  # the hub client raises errors of many kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise LeanMoeError(
            f"model {name} is no local folder and its config could not be fetched: {reason}"
        ) from error


def _shape(config: dict[str, Any], family: Family) -> MoEShape:
    hidden = _whole(config, "hidden_size")
    layers = _whole(config, "num_hidden_layers")
    experts = _whole(config, _present(config, family.experts, EXPERTS_KEYS))
    top_k = _whole(config, _present(config, family.top_k, TOP_K_KEYS))
    width = _whole(config, family.width)
    if experts < 2:
        raise LeanMoeError(f"{family.experts} is {experts}: not a mixture-of-experts model")
    if top_k > experts:
        raise LeanMoeError(f"{family.top_k} is {top_k}: it must be at most {experts}")
    router = family.router(config)
    if experts % router.groups or not 1 <= router.groups_used <= router.groups:
        raise LeanMoeError(
            f"{router.groups_used} of {router.groups} groups of {experts} experts is not possible"
        )
    shared = _whole(config, family.shared, 0) if family.shared else 0
    own_width = _whole(config, family.shared_width, 0) if family.shared_width else 0
    architectures = config.get("architectures") or [f"{config['model_type']}"]
    return MoEShape(
        architecture=str(architectures[0]),
        model_type=str(config["model_type"]),
        layers=layers,
        moe_layers=_moe_layers(config, family, layers),
        experts=experts,
        top_k=top_k,
        shared_experts=shared or (1 if own_width else 0),
        hidden=hidden,
        expert_width=width,
        shared_width=own_width or shared * width,
        dense_width=_whole(config, "intermediate_size", 0),
        vocabulary=_whole(config, "vocab_size"),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        attention=_attention(config, hidden),
        router=router,
        weight_bytes=_weight_bytes(config),
    )


def _moe_layers(config: dict[str, Any], family: Family, layers: int) -> tuple[int, ...]:
    first = _whole(config, family.first_moe, 0) if family.first_moe else 0
    step = _whole(config, family.step, 1) if family.step else 1
    dense = set(config.get(family.dense_only) or ()) if family.dense_only else set()
    moe = tuple(n for n in range(first, layers) if (n + 1) % max(step, 1) == 0 and n not in dense)
    if not moe:
        raise LeanMoeError("no decoder layer has routed experts: not a mixture-of-experts model")
    return moe


def _attention(config: dict[str, Any], hidden: int) -> Attention:
    heads = _whole(config, "num_attention_heads")
    if config.get("kv_lora_rank"):
        rope = _whole(config, "qk_rope_head_dim")
        return Attention(
            heads=heads,
            key_value_heads=heads,
            head_width=_whole(config, "qk_nope_head_dim") + rope,
            value_width=_whole(config, "v_head_dim"),
            query_rank=config.get("q_lora_rank"),
            key_value_rank=_whole(config, "kv_lora_rank"),
            rope_width=rope,
        )
    width = config.get("head_dim") or hidden // heads
    return Attention(heads, config.get("num_key_value_heads") or heads, width, width)


def _weight_bytes(config: dict[str, Any]) -> float:
    quantisation = config.get("quantization_config") or {}
    method = quantisation.get("quant_method") if isinstance(quantisation, dict) else None
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    return STORED_BYTES.get(str(method), STORED_BYTES.get(dtype, 2.0))


def _present(config: dict[str, Any], key: str, others: tuple[str, ...]) -> str:
    return key if key in config else next((other for other in others if other in config), key)


def _whole(config: dict[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        found = "missing" if value is None else repr(value)
        raise LeanMoeError(f"config.json: {key} is {found}: it must be a whole number, 0 or more")
    return value
