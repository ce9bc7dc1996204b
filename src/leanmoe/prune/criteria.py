"""By what experts are ranked, each criterion under its name with where it comes from.

Letters: L MoE layers, E experts.

What each expert does on text: how often it is used, how much it weighs, what it adds.

Letters: T tokens, K slots a token, L MoE layers, E experts, D hidden width, R rows of one expert.

Experts by how much a layer's output changes without them, greedily (NAEE, arXiv 2402.14800).

NAEE tries every subset of Mixtral's 8 experts; with 64 or 256 that is not possible. Here the one
goes whose loss changes the layer's output on calibration tokens least, then the next.

Letters: T tokens, K slots a token, E experts, D hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from leanmoe.core.errors import LeanMoeError, unknown_name
from leanmoe.kernels.dispatch import fast_route
from leanmoe.models.routers import Router
from leanmoe.plan import Rule
from leanmoe.runtime.experts import all_outputs, expert_outputs
from leanmoe.runtime.model import (
    MoELayer,
    decoder_layers,
    find_layers,
    shape_of,
)

Scores = NDArray[np.float64]
PAPER = "arXiv 2505.03531"


@dataclass(frozen=True)
class Criterion:
    """A way to rank experts; the higher the score, the longer an expert stays."""

    name: str
    title: str
    source: str
    by_place: Callable[[int, int], Scores] | None = None
    """Scores [E] of a layer from the number of experts and a seed: no text needed."""
    by_statistics: Callable[[ExpertStatistics], Scores] | None = None
    """Scores [L,E]. With neither: by `output_error`, which needs the model itself."""

    @property
    def needs_text(self) -> bool:
        """Whether the model has to be run."""
        return self.by_place is None


def criterion(name: str) -> Criterion:
    """The criterion of that name; raises LeanMoeError, naming near ones, for an unknown one."""
    if name not in CRITERIA:
        raise unknown_name("criterion", name, CRITERIA)
    return CRITERIA[name]


def place_scores(found: Criterion, layers: int, experts: int, seed: int) -> Scores:
    """Scores [L,E] of a criterion that needs no text; layers differ where chance decides."""
    assert found.by_place is not None
    return np.stack([found.by_place(experts, seed + layer) for layer in range(layers)])


def _random(experts: int, seed: int) -> Scores:
    return np.random.default_rng(seed).random(experts)


def _first(experts: int, _seed: int) -> Scores:
    return -np.arange(experts, dtype=np.float64)


def _last(experts: int, _seed: int) -> Scores:
    return np.arange(experts, dtype=np.float64)


def _odd(experts: int, _seed: int) -> Scores:
    numbers = np.arange(experts)
    return (numbers % 2 * experts - numbers).astype(np.float64)


def _even(experts: int, _seed: int) -> Scores:
    numbers = np.arange(experts)
    return ((1 - numbers % 2) * experts - numbers).astype(np.float64)


def _mean_output(seen: ExpertStatistics) -> Scores:
    return seen.outputs_LE / np.maximum(seen.slots_LE, 1)


CRITERIA = {
    found.name: found
    for found in (
        Criterion("random", "drawn by lot", PAPER, by_place=_random),
        Criterion("odd", "odd numbers first", PAPER, by_place=_odd),
        Criterion("even", "even numbers first", PAPER, by_place=_even),
        Criterion("first-half", "the first numbers", PAPER, by_place=_first),
        Criterion("last-half", "the last numbers", PAPER, by_place=_last),
        Criterion(
            "activate-count", "how often used", PAPER, by_statistics=lambda seen: seen.slots_LE
        ),
        Criterion(
            "soft-count", "sum of routing weights", PAPER, by_statistics=lambda seen: seen.gates_LE
        ),
        Criterion(
            "reap",
            "mean of routing weight x output length over the tokens routed to it",
            "arXiv 2510.13999",
            by_statistics=_mean_output,
        ),
        Criterion(
            "easy-ep",
            "sum of routing weight x output length x how far the token turns",
            "arXiv 2504.06792",
            by_statistics=lambda seen: seen.changes_LE,
        ),
        Criterion(
            "output-sum",
            "sum of routing weight x output length: REAP without the mean",
            "ours",
            by_statistics=lambda seen: seen.outputs_LE,
        ),
        Criterion(
            "output-error", "greedily by the error of the layer's output", "arXiv 2402.14800"
        ),
    )
}

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
        for expert, rows_X, slots_X, out_XD in expert_outputs(layer.experts, hidden_TD, ids_TK):
            gates_X = weights_TK[rows_X, slots_X].double()
            added_X = gates_X * out_XD.double().norm(dim=-1)
            values = (
                float(len(rows_X)),
                float(gates_X.sum()),
                float(added_X.sum()),
                float((added_X * change_T[rows_X].double()).sum()),
            )
            self._sums[:, layer.number, expert] += values
            largest = float(out_XD.abs().max())
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


SAMPLE_TOKENS = 256


@torch.inference_mode()
def removal_order(
    layer: MoELayer,
    router: Router,
    top_k: int,
    hidden_TD: Tensor,
    logits_TE: Tensor,
    least: int,
    progress: Callable[[int], None] = lambda _: None,
) -> NDArray[np.float64]:
    """Scores [E]: the later an expert goes, the higher; the last `least` are not told apart."""
    bias_E = layer.ranking_bias(router)
    outputs_TED = all_outputs(layer.experts, hidden_TD).float()
    state = _Layer(outputs_TED, logits_TE, router, top_k, bias_E)
    scores_E = np.full(logits_TE.shape[1], float(logits_TE.shape[1]))
    kept = list(range(logits_TE.shape[1]))
    for step in range(len(kept) - least):
        gone = min(kept, key=lambda expert: (state.error_without(expert, kept), expert))
        kept.remove(gone)
        state.settle(kept)
        scores_E[gone] = step
        progress(1)
    return scores_E


class _Layer:
    """A layer's output on the sample with the experts that are left, and how far it is off."""

    def __init__(
        self, outputs_TED: Tensor, logits_TE: Tensor, router: Router, top_k: int, bias_E: Any
    ) -> None:
        self._outputs, self._logits, self._bias = outputs_TED, logits_TE, bias_E
        self._router, self._top_k = router, top_k
        everyone = torch.arange(len(logits_TE), device=logits_TE.device)
        self._ids, self._full = self._run(everyone, None)
        self._error_T = torch.zeros(len(logits_TE), device=logits_TE.device)

    def error_without(self, expert: int, kept: list[int]) -> float:
        """Squared error of the layer's output if one more goes; only its tokens change."""
        rows = (self._ids == expert).any(dim=-1).nonzero().flatten()
        if not len(rows):
            return float(self._error_T.sum())
        _, out = self._run(rows, [other for other in kept if other != expert])
        changed = (out - self._full[rows]).square().sum(dim=-1)
        return float(self._error_T.sum() - self._error_T[rows].sum() + changed.sum())

    def settle(self, kept: list[int]) -> None:
        """Goes on from these experts."""
        everyone = torch.arange(len(self._logits), device=self._logits.device)
        self._ids, out = self._run(everyone, kept)
        self._error_T = (out - self._full).square().sum(dim=-1)

    def _run(self, rows: Tensor, kept: list[int] | None) -> tuple[Tensor, Tensor]:
        rule = Rule(experts=None if kept is None else tuple(kept))
        routing = fast_route(self._logits[rows], self._router, self._top_k, rule, self._bias)
        experts = self._logits.shape[1]
        used = routing.ids_BTK < experts
        ids = routing.ids_BTK.clamp(max=experts - 1)
        parts_TKD = self._outputs[rows[:, None], ids]
        weights_TK = routing.weights_BTK.float() * used
        return routing.ids_BTK, torch.einsum("tkd,tk->td", parts_TKD, weights_TK)
