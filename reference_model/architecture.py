"""What the reference models are: a DeepSeek-V3 in small, and a Qwen3-MoE in small.

Shape suffixes used in this package: S sequences, N tokens of a sequence, T tokens, E routed
experts, K slots of a token, X all slots in order of their experts, D hidden width, M expert width,
V vocabulary, L MoE layers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

from leanmoe.models.routers import BIAS


@dataclass(frozen=True)
class ModelSettings(ABC):
    """Sizes of a model, whatever its architecture; the defaults are those of the packaged one."""

    vocab_size: int = 7936
    """62 x 128: the most that keeps weights and tokenizer under 36 MB."""
    hidden: int = 224
    layers: int = 7
    experts: int = 64
    expert_intermediate: int = 48
    top_k: int = 8
    heads: int = 4
    context: int = 1024
    init_std: float = 0.02

    @abstractmethod
    def to_config(self) -> PreTrainedConfig:
        """The Transformers configuration."""

    @property
    @abstractmethod
    def weights_met(self) -> int:
        """Weights of the matrices that a token meets: of the experts, those it uses."""

    @property
    @abstractmethod
    def head_widths(self) -> int:
        """The width of a head's keys plus that of its values."""


@dataclass(frozen=True)
class DeepseekV3Settings(ModelSettings):
    """The packaged model: a sigmoid router with groups, a shared expert, latent attention."""

    dense_layers: int = 1
    dense_intermediate: int = 432
    shared_experts: int = 1
    groups: int = 8
    groups_used: int = 4
    kv_rank: int = 64
    qk_nope: int = 32
    qk_rope: int = 32
    v_head: int = 64
    routed_scaling: float = 2.5

    def to_config(self) -> DeepseekV3Config:
        """The Transformers configuration, with the keys that vLLM's DeepSeek loader needs too."""
        return DeepseekV3Config(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden,
            intermediate_size=self.dense_intermediate,
            moe_intermediate_size=self.expert_intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            n_shared_experts=self.shared_experts,
            n_routed_experts=self.experts,
            routed_scaling_factor=self.routed_scaling,
            kv_lora_rank=self.kv_rank,
            q_lora_rank=None,
            qk_rope_head_dim=self.qk_rope,
            v_head_dim=self.v_head,
            qk_nope_head_dim=self.qk_nope,
            n_group=self.groups,
            topk_group=self.groups_used,
            num_experts_per_tok=self.top_k,
            first_k_dense_replace=self.dense_layers,
            norm_topk_prob=True,
            max_position_embeddings=self.context,
            initializer_range=self.init_std,
            # No pad_token_id: nn.Embedding would then never train that row, and padding shares
            # its id with the token that starts every document.
            pad_token_id=None,
            bos_token_id=0,
            eos_token_id=0,
            tie_word_embeddings=False,  # vLLM's DeepSeek loader cannot tie
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            num_nextn_predict_layers=0,
            # Not read by Transformers; vLLM asks for both.
            topk_method="noaux_tc",
            scoring_func="sigmoid",
        )

    @property
    def weights_met(self) -> int:
        """The dense layers, then routed and shared experts; the output matrix, not the lookup."""
        attention = (
            self.hidden * self.heads * (self.qk_nope + self.qk_rope)
            + self.hidden * (self.kv_rank + self.qk_rope)
            + self.kv_rank * self.heads * (self.qk_nope + self.v_head)
            + self.heads * self.v_head * self.hidden
        )
        dense = 3 * self.hidden * self.dense_intermediate
        moe = 3 * self.hidden * self.expert_intermediate * (self.top_k + self.shared_experts)
        moe += self.hidden * self.experts
        return (
            self.layers * attention
            + self.dense_layers * dense
            + (self.layers - self.dense_layers) * moe
            + self.hidden * self.vocab_size
        )

    @property
    def head_widths(self) -> int:
        """Keys have a part with and one without rotary positions."""
        return self.qk_nope + self.qk_rope + self.v_head


@dataclass(frozen=True)
class Qwen3MoeSettings(ModelSettings):
    """Another kind: a normalised softmax router, no groups, no shared expert, no dense layer."""

    key_value_heads: int = 2
    head: int = 64

    def to_config(self) -> Qwen3MoeConfig:
        """The Transformers configuration; every layer is sparse."""
        return Qwen3MoeConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden,
            intermediate_size=self.top_k * self.expert_intermediate,  # no layer is dense
            moe_intermediate_size=self.expert_intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_value_heads,
            head_dim=self.head,
            num_experts=self.experts,
            num_experts_per_tok=self.top_k,
            norm_topk_prob=True,
            max_position_embeddings=self.context,
            initializer_range=self.init_std,
            pad_token_id=None,  # see above
            bos_token_id=0,
            eos_token_id=0,
            tie_word_embeddings=False,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        )

    @property
    def weights_met(self) -> int:
        """Attention with grouped queries, router and experts; the output matrix, not the lookup."""
        attention = 2 * self.hidden * self.head * (self.heads + self.key_value_heads)
        moe = 3 * self.hidden * self.expert_intermediate * self.top_k + self.hidden * self.experts
        return self.layers * (attention + moe) + self.hidden * self.vocab_size

    @property
    def head_widths(self) -> int:
        """Keys and values are as wide."""
        return 2 * self.head


ARCHITECTURES: dict[str, type[ModelSettings]] = {
    "deepseek_v3": DeepseekV3Settings,
    "qwen3_moe": Qwen3MoeSettings,
}


def build(settings: ModelSettings, seed: int) -> PreTrainedModel:
    """A freshly initialised float32 model, the same for the same seed on every device."""
    torch.manual_seed(seed)
    config = settings.to_config()
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    return model


def to_bf16(model: PreTrainedModel) -> None:
    """Casts all weights to bf16 and leaves the routers' correction biases in float32."""
    biases = [correction_bias(gate).float().clone() for gate in biased_routers(model)]
    model.to(torch.bfloat16)
    for gate, bias in zip(biased_routers(model), biases, strict=True):
        setattr(gate, BIAS, bias)


def routers(model: PreTrainedModel) -> list[nn.Module]:
    """The routers of the MoE layers, in order of depth."""
    return [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "gate")]


def biased_routers(model: PreTrainedModel) -> list[nn.Module]:
    """The routers that have a correction bias; one that scores by softmax alone has none."""
    return [gate for gate in routers(model) if hasattr(gate, BIAS)]


def correction_bias(gate: nn.Module) -> Tensor:
    """The (E) bias that a router adds to its scores for ranking only."""
    bias = getattr(gate, BIAS)
    assert isinstance(bias, Tensor)
    return bias.detach()


@dataclass(frozen=True)
class FlopCount:
    """Multiply-adds of one trained token, times two; see `count_flops`."""

    matrices: int
    attention: int

    @property
    def total(self) -> int:
        """FLOPs of forward and backward for one token."""
        return self.matrices + self.attention


def count_flops(settings: ModelSettings) -> FlopCount:
    """Model FLOPs of one training token: 6 per weight of each matrix it meets, plus attention.

    Counted: top-k and shared experts (not the skipped ones), routers, the output matrix. Not
    counted: the embedding lookup, norms, activations, softmax, the optimiser. Attention: scores
    and values over half the context on average (causal), 3 x forward for forward and backward.
    """
    s = settings
    attention = s.layers * 3 * 2 * s.heads * s.head_widths * s.context // 2
    return FlopCount(matrices=6 * s.weights_met, attention=attention)


def describe(model: PreTrainedModel) -> dict[str, Any]:
    """Parameter counts of a built model."""
    total = sum(parameter.numel() for parameter in model.parameters())
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    return {"parameters": total, "routed_expert_parameters": experts}
