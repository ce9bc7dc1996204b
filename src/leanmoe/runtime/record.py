"""Hands out what a model's routers say, layer by layer, as it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from leanmoe.core.errors import LeanMoeError
from leanmoe.runtime.layers import MoELayer, find_layers, router_logits

Sink = Callable[[int, Tensor], None]


@contextmanager
def record(model: Any, sink: Sink) -> Iterator[None]:
    """Calls `sink(layer number, logits_TE)` for each MoE layer of each forward call.

    Raises LeanMoeError, naming the layer, when a router's logits are not finite.
    """
    with ExitStack() as hooks:
        for layer in find_layers(model):
            hooks.callback(layer.router.register_forward_hook(_pass_on(layer, sink)).remove)
        yield


def _pass_on(layer: MoELayer, sink: Sink) -> Callable[[nn.Module, Any, Any], None]:
    def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        logits_TE = router_logits(output).flatten(0, -2).float()
        if not bool(logits_TE.isfinite().all()):
            raise LeanMoeError(f"{layer.name}: router logits are not finite (NaN or infinity)")
        sink(layer.number, logits_TE)

    return hook
