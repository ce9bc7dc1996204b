"""What each expert does on text: how often it is used, how much it weighs, what it adds.

Letters: T tokens, K slots a token, L MoE layers, E experts, D hidden width, R rows of one expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from leanmoe.core.errors import LeanMoeError
from leanmoe.runtime.experts import expert_outputs
from leanmoe.runtime.layers import MoELayer, decoder_layers, find_layers, shape_of

SUPER_QUANTILE, SUPER_SHARE, SUPER_TIMES = 0.995, 0.1, 5.0
"""An expert is super if its largest output is above this quantile of all experts' and above this
share of the largest of all (arXiv 2507.23279, section 3), and above so many times its layer's
median: without that, which is ours, every model would have some."""


@dataclass(frozen=True)
class ExpertStatistics:
    """Sums over the slots of all tokens seen, each [L,E]."""

    tokens: int
    slots_LE: NDArray[np.float64]
    """Slots that used the expert: the paper's activate count (arXiv 2505.03531)."""
    gates_LE: NDArray[np.float64]
    """Of its routing weights: the paper's soft count."""
    outputs_LE: NDArray[np.float64]
    """Of routing weight x length of its output."""
    changes_LE: NDArray[np.float64]
    """The same, each token by how far the routed experts turn its hidden state: 1 - cosine."""
    largest_LE: NDArray[np.float64]
    """Its largest output value."""

    def super_experts(self) -> list[tuple[int, int]]:
        """Layer and expert of those with extreme outputs, which a model cannot lose."""
        top = float(self.largest_LE.max())
        bound = max(float(np.quantile(self.largest_LE, SUPER_QUANTILE)), SUPER_SHARE * top)
        usual_L1 = np.median(self.largest_LE, axis=1, keepdims=True)
        is_super_LE = (self.largest_LE > bound) & (self.largest_LE > SUPER_TIMES * usual_L1)
        return [(int(layer), int(expert)) for layer, expert in np.argwhere(is_super_LE)]


class Watch:
    """Adds up what the experts of a model do while it runs."""

    def __init__(self, layers: int, experts: int) -> None:
        self._sums = np.zeros((4, layers, experts))
        self._largest = np.zeros((layers, experts))
        self._tokens = [0] * layers
        self.real_T: Tensor | None = None
        """True for tokens of the coming call that are no padding; None for all of them."""

    def result(self) -> ExpertStatistics:
        """All that was seen. Raises LeanMoeError if that is nothing."""
        if not min(self._tokens):
            raise LeanMoeError("no text was run: there is nothing to rank experts by")
        slots, gates, outputs, changes = self._sums.copy()
        largest = self._largest.copy()
        return ExpertStatistics(self._tokens[0], slots, gates, outputs, changes, largest)

    def add(
        self, layer: MoELayer, inputs: tuple[Tensor, Tensor, Tensor], routed_TD: Tensor,
        after_TD: Tensor,
    ) -> None:  # fmt: skip
        """One call of a layer: what its experts were given and gave, and the hidden state after."""
        real_T = self.real_T
        if real_T is None:
            real_T = torch.ones(len(routed_TD), dtype=torch.bool, device=routed_TD.device)
        real_T = real_T.to(routed_TD.device)
        hidden_TD, ids_TK, weights_TK = (tensor[real_T] for tensor in inputs)
        routed_TD, after_TD = routed_TD[real_T].float(), after_TD[real_T].float()
        change_T = 1 - functional.cosine_similarity(after_TD - routed_TD, after_TD, dim=-1)
        self._tokens[layer.number] += len(hidden_TD)
        for expert, rows_R, slots_R, out_RD in expert_outputs(layer.experts, hidden_TD, ids_TK):
            gates_R = weights_TK[rows_R, slots_R].double()
            added_R = gates_R * out_RD.double().norm(dim=-1)
            values = (
                float(len(rows_R)),
                float(gates_R.sum()),
                float(added_R.sum()),
                float((added_R * change_T[rows_R].double()).sum()),
            )
            self._sums[:, layer.number, expert] += values
            largest = float(out_RD.abs().max())
            self._largest[layer.number, expert] = max(self._largest[layer.number, expert], largest)


@contextmanager
def watch(model: Any) -> Iterator[Watch]:
    """Within it, every forward call of `model` is watched; nothing it computes changes."""
    shape, layers = shape_of(model), find_layers(model)
    decoders = decoder_layers(model)
    found = Watch(len(layers), shape.experts)
    calls: dict[int, tuple[tuple[Tensor, Tensor, Tensor], Tensor]] = {}
    with ExitStack() as hooks:
        for layer in layers:

            def caught(_module: Any, inputs: Any, output: Any, number: int = layer.number) -> None:
                calls[number] = (inputs, output)

            def done(_module: Any, _inputs: Any, output: Any, layer: MoELayer = layer) -> None:
                inputs, routed_TD = calls.pop(layer.number)
                after = output if isinstance(output, Tensor) else output[0]
                with torch.inference_mode():
                    flat_TD = after.reshape(-1, after.shape[-1])
                    found.add(layer, inputs, routed_TD.reshape(flat_TD.shape), flat_TD)

            hooks.callback(layer.experts.register_forward_hook(caught).remove)
            decoder = decoders[layer.decoder_index]
            hooks.callback(decoder.register_forward_hook(done).remove)
        yield found
