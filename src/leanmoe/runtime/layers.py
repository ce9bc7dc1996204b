"""Finds a model's MoE layers: a router beside an experts module, whatever the family.

Transformers calls an experts module with `(hidden_states, top_k_index, top_k_weights)`; the
router beside it makes the logits. Only these two are ever touched.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from leanmoe.core.errors import LeanMoeError
from leanmoe.models.routers import Router
from leanmoe.models.shape import MoEShape, read_shape

ROUTER_NAMES = ("gate", "router")


@dataclass(frozen=True)
class MoELayer:
    """One MoE layer of a loaded model."""

    number: int
    """Its place among the MoE layers, from 0."""
    decoder_index: int
    """Its place among all decoder layers."""
    name: str
    router: Any
    """This and the next are modules whose attributes differ by family."""
    experts: Any
    block: nn.Module
    """What holds both."""

    def ranking_bias(self, router: Router) -> Tensor | None:
        """The bias that ranks without weighing, from the router or the block around it."""
        if router.ranking_bias is None:
            return None
        for module in (self.router, self.block):
            found: object = module
            for name in router.ranking_bias.split("."):
                found = getattr(found, name, None)
            if isinstance(found, Tensor):
                return found.reshape(-1)
        raise LeanMoeError(
            f"{self.name} has no {router.ranking_bias}: this family's router has one"
        )


def shape_of(model: Any) -> MoEShape:
    """The shape of a loaded model, from its own config."""
    config = model.config.to_dict()
    config["architectures"] = [type(model).__name__]
    return read_shape(config)


def find_layers(model: Any) -> tuple[MoELayer, ...]:
    """The MoE layers in order; raises LeanMoeError where they do not match the config."""
    shape = shape_of(model)
    layers: list[MoELayer] = []
    for index, decoder in enumerate(decoder_layers(model)):
        for name, block in decoder.named_modules():
            experts = getattr(block, "experts", None)
            router = next((getattr(block, n) for n in ROUTER_NAMES if hasattr(block, n)), None)
            if experts is not None and _is_experts(experts) and isinstance(router, nn.Module):
                layers.append(
                    MoELayer(len(layers), index, f"layers.{index}.{name}", router, experts, block)
                )
    found = tuple(layer.decoder_index for layer in layers)
    if found != shape.moe_layers:
        raise LeanMoeError(
            f"{shape.architecture}: MoE layers were found at {list(found)}, "
            f"but its config says {list(shape.moe_layers)}: this family cannot be run yet"
        )
    return tuple(layers)


def router_logits(output: Any) -> Tensor:
    """The logits a router's forward returns, alone or in a tuple.

    They come first, but for Granite's router in Transformers 5.17 (ids, weights, logits).
    """
    if isinstance(output, Tensor):
        return output
    logits: Tensor = output[0] if output[0].is_floating_point() else output[-1]
    return logits


def why_not_full_attention(config: Any) -> str | None:
    """Why a token of this model does not see all tokens before it; None if it does."""
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"]) - {"full_attention"}
    if kinds:
        return f"it has layers of {', '.join(sorted(map(str, kinds)))}"
    window = getattr(config, "sliding_window", None)
    if window is not None and getattr(config, "use_sliding_window", True):
        return f"its attention reaches back {window} tokens only"
    return None


def decoder_layers(model: Any) -> nn.ModuleList:
    """The decoder layers, the longest list of modules below the model's head."""
    lists = [m for m in model.base_model.modules() if isinstance(m, nn.ModuleList)]
    if not lists:
        raise LeanMoeError(f"{type(model).__name__} has no list of decoder layers")
    return max(lists, key=len)


def _is_experts(module: Any) -> bool:
    """Whether Transformers' experts interface dispatches this module."""
    return isinstance(module, nn.Module) and hasattr(module, "_apply_gate")
