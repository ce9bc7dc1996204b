"""What a model family is: how it routes, and where its config.json says what its layers hold.

The table of them is `families.py`. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from leanmoe.models.attention import Mixer
from leanmoe.models.hf_config import HfConfig
from leanmoe.models.routers import Router


@dataclass(frozen=True)
class Family:
    """How a family's router works, and where its config.json says what its layers hold."""

    router: Callable[[HfConfig], Router]
    mixer: Mixer
    """Counts the weights of what mixes tokens in a decoder layer."""
    width: str = "moe_intermediate_size"
    """Key of a routed expert's width."""
    dense_width: str = "intermediate_size"
    """Key of a dense layer's width."""
    shared_width: str | None = None
    """Key of the shared expert's own width; else `n_shared_experts` as wide as a routed one."""
    sublayers: int = 1
    """Attention blocks, and shared experts of the width that `shared_width` names, in a layer."""
    shared_gate: bool = False
    """Whether a gate of its own weighs the shared expert."""
    matrices: int = 3
    """Matrices of an expert: gate, up and down projection; 2 where there is no gate."""
    biases: bool = False
    """Whether the router and the experts have bias terms."""
    layer_norms: int = 2
    """Norms of the hidden width in a decoder layer."""
    moe_norms: int = 0
    """Further ones in an MoE layer."""
    norm_biases: bool = False
    further: Callable[[HfConfig], int] | None = None
    """Counts the weights that stand in no layer, beside embedding, head and last norm."""
    single: bool = False
    """Whether a layer is a mixer or experts, not one after the other (Nemotron-H)."""
    ignores: tuple[str, ...] = ()
    """Settings that say nothing of such a model, though some Transformers write them."""
    defaults: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    """What Transformers assumes where a config.json says nothing."""
    not_runnable: str | None = None
    """Why no plan can run on the family, which can only be inspected; None where one can."""


NOT_YET = (
    "axk2", "deepseek_ocr2_text", "dots3_note_text", "inkling2_text", "mistral_large4_text",
    "muse_spark_text", "qwen3_omni_moe_talker_text", "qwen4_exp_text", "unlimited_ocr_text",
)  # fmt: skip
"""Model types of Transformers 5.23 with routed experts that the table of families lacks."""
REFUSED: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(NOT_YET, "leanmoe does not know its layers yet"),
        "dbrx": "it divides weights by their norm, not by their sum",
        "doge": "its experts are rows of two tables, looked up by product keys",
        "diffusion_gemma_text": "it writes a block of tokens at once, not one after the other",
        **dict.fromkeys(
            ("ernie4_5_moe_vl", "ernie4_5_vl_moe", "ernie4_5_vl_moe_text"),
            "tokens of text and of images have routers of their own",
        ),
        "inkling_text": "its shared experts share the routed ones' normalisation",
        "inkling2_loop_text": "it runs the same layers several times for a token",
        "jetmoe": "its attention has experts too",
        "kolibri1": "it ranks experts by logits and weighs them by their sigmoid",
        "llama4_text": "it weighs what goes into an expert, not what comes out",
        "nllb-moe": "it is an encoder and a decoder",
        "openai_privacy_filter": "it labels tokens and writes none",
        "switch_transformers": "it is an encoder and a decoder",
        "zaya": "its router hands a state from layer to layer and may choose no expert",
    }
)
"""Model types with experts of which nothing here holds, and why. No plan can run on them."""
WITHOUT_TEXT_CLASS = frozenset(
    {
        "bailing_moe", "deepseek", "glm4v_moe_text", "glm5_next_text", "kimi_k2", "minimax_m1",
        "minimax_text_01", "mistral4", "qwen3_omni_moe_text", "qwen3_vl_moe_text", "sarvam_mla",
        "sarvam_moe", "step3p5",
    }
)  # fmt: skip
"""Families that no class of Transformers 5.23 loads as a language model by itself."""
LOADED_AROUND = frozenset({"gemma4", "qwen3_5_moe"})
"""Multimodal model types that Transformers' AutoModelForCausalLM loads all the same."""


def not_loadable_reason(config: Mapping[str, Any], model_type: str) -> str | None:
    """Why Transformers cannot load the model of a config.json as text; None where it can.

    `model_type` is the language model's. Code that a checkpoint brings along (`auto_map`) counts.
    """
    outer = config.get("model_type")
    mapped = config.get("auto_map")
    if isinstance(mapped, Mapping) and "AutoModelForCausalLM" in mapped:
        return None
    is_alone = outer in (None, model_type)
    if model_type not in WITHOUT_TEXT_CLASS if is_alone else outer in tuple(LOADED_AROUND):
        return None
    return f"Transformers has no class that loads {outer or model_type} as a language model"
