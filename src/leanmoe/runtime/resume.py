"""Runs a model from one of its decoder layers on, with hidden states kept from an earlier run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from leanmoe.core.errors import LeanMoeError
from leanmoe.runtime.layers import decoder_layers


@contextmanager
def keep_hidden(model: Any, decoder_indices: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Fills the yielded mapping with the hidden states [N,L,D] that enter these decoder layers."""
    layers = decoder_layers(model)
    kept: dict[int, Tensor] = {}
    with ExitStack() as hooks:
        for index in decoder_indices:
            hook = layers[index].register_forward_pre_hook(_keep(kept, index), with_kwargs=True)
            hooks.callback(hook.remove)
        yield kept


@torch.inference_mode()
def hidden_before(
    model: Any, input_ids_NL: Tensor, decoder_indices: Sequence[int]
) -> dict[int, Tensor]:
    """The hidden states [N,L,D] that enter these decoder layers for these tokens."""
    with keep_hidden(model, decoder_indices) as kept:
        model(input_ids=input_ids_NL, use_cache=False, logits_to_keep=1)
    return kept


@contextmanager
def resume_from(model: Any, decoder_index: int, hidden_NLD: Tensor) -> Iterator[None]:
    """Makes `model`'s forward start at decoder layer `decoder_index` with these hidden states.

    The layers before it return at once; masks and position embeddings are the model's own, so
    the logits are those of the whole forward, bit for bit. Scoring calls only (no cache).
    """
    layers = decoder_layers(model)
    if not 0 <= decoder_index < len(layers):
        raise LeanMoeError(
            f"decoder layer {decoder_index} does not exist: it must be 0 to {len(layers) - 1}"
        )
    before = [layer.forward for layer in layers[:decoder_index]]
    hook = layers[decoder_index].register_forward_pre_hook(
        lambda _module, inputs, keywords: _replaced(inputs, keywords, hidden_NLD), with_kwargs=True
    )
    try:
        for layer in layers[:decoder_index]:
            layer.forward = _pass_through
        yield
    finally:
        hook.remove()
        for layer, forward in zip(layers, before, strict=False):
            if "forward" in vars(layer):
                del layer.forward
            if layer.forward != forward:
                layer.forward = forward


def _pass_through(hidden_states: Tensor, *_inputs: Any, **_keywords: Any) -> Tensor:
    return hidden_states


def _replaced(
    inputs: tuple[Any, ...], keywords: dict[str, Any], hidden_NLD: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if "hidden_states" in keywords:
        return inputs, {**keywords, "hidden_states": hidden_NLD}
    return (hidden_NLD, *inputs[1:]), keywords


def _keep(kept: dict[int, Tensor], index: int) -> Callable[[nn.Module, Any, Any], None]:
    def hook(_module: nn.Module, inputs: Any, keywords: dict[str, Any]) -> None:
        kept[index] = keywords["hidden_states"] if "hidden_states" in keywords else inputs[0]

    return hook
