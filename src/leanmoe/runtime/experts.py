"""leanmoe's kernels as an experts implementation of Transformers, under the name "leanmoe"."""

from __future__ import annotations

import logging
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from leanmoe.kernels import Choice, ExpertWeights, Gate, choose_experts

IMPLEMENTATION = "leanmoe"

logger = logging.getLogger(__name__)
_prepared: WeakKeyDictionary[nn.Module, tuple[tuple[int, ...], ExpertWeights, Choice]]
_prepared = WeakKeyDictionary()


def register_experts() -> None:
    """Makes `model.set_experts_implementation("leanmoe")` possible; harmless to call again."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    if IMPLEMENTATION not in ALL_EXPERTS_FUNCTIONS:
        ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)


def experts_forward(
    module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Transformers' experts interface: (T,D), (T,K) and (T,K) to (T,D)."""
    weights, choice = prepared(module)
    return choice.function(hidden_states, top_k_index, top_k_weights, weights)


def prepared(module: Any) -> tuple[ExpertWeights, Choice]:
    """The module's weights as our kernels take them, and the kernel chosen; made once."""
    up = module.gate_up_proj if module.has_gate else module.up_proj
    key = (up.data_ptr(), module.down_proj.data_ptr())
    known = _prepared.get(module)
    if known is not None and known[0] == key:
        return known[1], known[2]
    biases = (getattr(module, f"{n}_proj_bias", None) for n in ("gate_up", "down"))
    up_bias, down_bias = biases if module.has_bias else (None, None)
    weights = ExpertWeights(
        gate_up=up.detach(),
        down=module.down_proj.detach(),
        gate_up_bias=None if up_bias is None else up_bias.detach(),
        down_bias=None if down_bias is None else down_bias.detach(),
        is_transposed=module.is_transposed,
        is_concatenated=getattr(module, "is_concatenated", True),
        is_gated=module.has_gate,
        gate=_gate(module),
    )
    choice = choose_experts(weights, up.device)
    logger.info("%s: experts run by %s (%s)", type(module).__name__, choice.name, choice.reason)
    _prepared[module] = (key, weights, choice)
    return weights, choice


def _gate(module: Any) -> Gate | Any:
    """silu(gate) * up where that is what the family does; else the family's own function."""
    own = type(module)._apply_gate.__module__ != "transformers.integrations.moe"
    activation = getattr(module.config, "hidden_act", None)
    if not own and activation == "silu":
        return Gate("silu")
    return module._apply_gate if module.has_gate else module.act_fn
