"""leanmoe's kernels as an experts implementation of Transformers, under the name "leanmoe"."""

from __future__ import annotations

import logging
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from leanmoe.core.errors import LeanMoeError
from leanmoe.kernels import Choice, Experts, ExpertWeights, Gate, choose_experts
from leanmoe.kernels.weights import ACTIVATIONS, Activation

IMPLEMENTATION = "leanmoe"
PROBE_ROWS, PROBE_WIDTH = 8, 16

logger = logging.getLogger(__name__)
_prepared: WeakKeyDictionary[nn.Module, tuple[tuple[int, ...], ExpertWeights, Choice[Experts]]]
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


def has_interface(module: Any) -> bool:
    """Whether Transformers' experts interface dispatches this module."""
    return hasattr(module, "has_gate") and hasattr(module, "_apply_gate")


def prepared(module: Any) -> tuple[ExpertWeights, Choice[Experts]]:
    """The module's weights as our kernels take them, and the kernel chosen; made once.

    Raises LeanMoeError for a module that is not behind Transformers' experts interface.
    """
    if not has_interface(module):
        raise LeanMoeError(
            f"{type(module).__name__} is not behind Transformers' experts interface: leanmoe's "
            "kernels cannot compute it; set experts to 'stock'"
        )
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
    """The gate our kernels know that does what the family's own function does; else that function.

    Told by a probe: names of activations and attributes differ by family, results do not.
    """
    own = module._apply_gate if module.has_gate else module.act_fn
    draw = torch.Generator().manual_seed(0)
    probe = 4.0 * torch.randn(PROBE_ROWS, 2 * PROBE_WIDTH, generator=draw)
    try:
        with torch.inference_mode():
            wanted = own(probe)
            for gate in _known_gates(module):
                if torch.allclose(_gated(gate, module, probe), wanted, rtol=1e-4, atol=1e-5):
                    return gate
    except (RuntimeError, TypeError, AttributeError) as error:
        logger.info("%s: its gate cannot be probed (%s)", type(module).__name__, error)
    return own


def _known_gates(module: Any) -> list[Gate]:
    known = [Gate(cast(Activation, activation)) for activation in ACTIVATIONS]
    limit, alpha = getattr(module, "limit", None), getattr(module, "alpha", 1.0)
    if isinstance(limit, int | float) and isinstance(alpha, int | float):
        known.append(Gate.gpt_oss(float(limit), float(alpha)))
        known.append(Gate("silu", limit=float(limit), alpha=float(alpha)))
    return known


def _gated(gate: Gate, module: Any, probe: Tensor) -> Tensor:
    if not module.has_gate:
        return gate.activate(probe)
    if getattr(module, "is_concatenated", True):
        return gate.combine(*probe.chunk(2, dim=-1))
    return gate.combine(probe[..., ::2], probe[..., 1::2])
