"""Which experts matter least, and which remain: eleven criteria, each with formula and source.

`rank_experts` gives every expert of every layer a score S; the higher, the longer it stays.
`best_experts` takes those of highest score, as many in each layer, and in each group.

Symbols of the formulas, all for one MoE layer and over the tokens t of the calibration text:

    E          experts of the layer, numbered j = 0 ... E − 1
    T_j        tokens routed to expert j: those that have it among their top-k
    g_j(t)     the weight that the router gives expert j for token t
    f_j(t)     the output of expert j for token t, a vector [D]
    y(t)       the layer's routed output: Σ_j g_j(t) f_j(t) over the token's top-k
    h(t)       the hidden state after the decoder layer, y(t) included
    ‖·‖        the Euclidean norm

Letters: T tokens, K slots of a token, L MoE layers, E experts, D hidden width, X slots in the
order of their experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from leanmoe.core.errors import LeanMoeError
from leanmoe.core.progress import bar
from leanmoe.core.registry import Registry
from leanmoe.models.shape import MoEShape
from leanmoe.plan import Band, Plan, Rule
from leanmoe.prune.output_error import output_errors
from leanmoe.runtime import find_layers, shape_of
from leanmoe.runtime.model import MoELayer, decoder_layers
from leanmoe.scoring.divergence import final_hidden
from leanmoe.scoring.windows import Windows

Scores = NDArray[np.float64]
Kept = tuple[tuple[int, ...], ...]
"""For each MoE layer the experts that remain, ascending."""
PAPER = "arXiv 2505.03531"
SUPER_QUANTILE, SUPER_SHARE, SUPER_TIMES = 0.995, 0.1, 5.0
"""An expert is super if its largest output is above this quantile of all experts' and above this
share of the largest of all (arXiv 2507.23279, section 3), and above so many times its layer's
median: without that, which is ours, every model would have some."""


@dataclass(frozen=True)
class Criterion:
    """A way to rank experts. Exactly one of the three functions is given."""

    name: str
    title: str
    source: str
    formula: str
    by_number: Callable[[int, int], Scores] | None = None
    """Scores [E] of a layer from the number of experts and a seed: no text is read."""
    by_statistics: Callable[[ExpertStatistics], Scores] | None = None
    """Scores [L,E] from what the experts did on text."""
    by_model: Callable[[Any, Windows, int], Scores] | None = None
    """Scores [L,E] from the model itself, windows, and the fewest experts that may remain."""

    @property
    def needs_text(self) -> bool:
        """Whether the model has to be run."""
        return self.by_number is None


def rank_experts(
    criterion: Criterion,
    shape: MoEShape,
    seed: int,
    model: Any = None,
    windows: Windows | None = None,
    least: int = 0,
    seen: ExpertStatistics | None = None,
) -> Scores:
    """Scores [L,E] by a criterion: the higher, the longer an expert stays.

    `model` and `windows` are needed where `criterion.needs_text`. `least` is the fewest experts of
    a layer that may remain, which are then not told apart by `output-error`. `seen` spares watching
    the model again.
    """
    if criterion.by_number is not None:
        layers = range(len(shape.moe_layers))
        return np.stack([criterion.by_number(shape.experts, seed + layer) for layer in layers])
    assert windows is not None
    if criterion.by_model is not None:
        return criterion.by_model(model, windows, least)
    assert criterion.by_statistics is not None
    return criterion.by_statistics(observe(model, windows) if seen is None else seen)


@dataclass(frozen=True)
class ExpertStatistics:
    """What each expert did on text: sums over the slots that used it, each [L,E]."""

    tokens: int
    slots_LE: Scores
    """|T_j|: the slots that used the expert."""
    gates_LE: Scores
    """Σ g_j(t)."""
    outputs_LE: Scores
    """Σ g_j(t) ‖f_j(t)‖."""
    changes_LE: Scores
    """Σ c(t) g_j(t) ‖f_j(t)‖, where c(t) is how far the routed experts turn the token."""
    largest_LE: Scores
    """The largest absolute value in any f_j(t)."""

    def super_experts(self) -> list[tuple[int, int]]:
        """Layer and expert of those with extreme outputs, which a model cannot lose."""
        top = float(self.largest_LE.max())
        bound = max(float(np.quantile(self.largest_LE, SUPER_QUANTILE)), SUPER_SHARE * top)
        usual_L1 = np.median(self.largest_LE, axis=1, keepdims=True)
        is_super_LE = (self.largest_LE > bound) & (self.largest_LE > SUPER_TIMES * usual_L1)
        return [(int(layer), int(expert)) for layer, expert in np.argwhere(is_super_LE)]


def _parity_first(experts: int, parity: int) -> Scores:
    """Numbers of this parity above the others, in each half the lower numbers first."""
    numbers = np.arange(experts)
    scores_E: Scores = ((numbers % 2 == parity) * experts - numbers).astype(np.float64)
    return scores_E


CRITERIA: Registry[Criterion] = Registry("criterion")
for _each in (
    Criterion(
        "random", "drawn at random", PAPER, "S_j uniform between 0 and 1, drawn for each layer",
        by_number=lambda experts, seed: np.random.default_rng(seed).random(experts),
    ),
    Criterion(
        "odd", "odd numbers first", PAPER, "S_j = E · (j mod 2) − j",
        by_number=lambda experts, _: _parity_first(experts, 1),
    ),
    Criterion(
        "even", "even numbers first", PAPER, "S_j = E · (1 − j mod 2) − j",
        by_number=lambda experts, _: _parity_first(experts, 0),
    ),
    Criterion(
        "first-half", "the first numbers", PAPER, "S_j = −j",
        by_number=lambda experts, _: -np.arange(experts, dtype=np.float64),
    ),
    Criterion(
        "last-half", "the last numbers", PAPER, "S_j = j",
        by_number=lambda experts, _: np.arange(experts, dtype=np.float64),
    ),
    Criterion(
        "activate-count", "how often used", PAPER, "S_j = |T_j|",
        by_statistics=lambda seen: seen.slots_LE,
    ),
    Criterion(
        "soft-count", "sum of routing weights", PAPER, "S_j = Σ_{t ∈ T_j} g_j(t)",
        by_statistics=lambda seen: seen.gates_LE,
    ),
    Criterion(
        "reap", "mean of routing weight x output length over the tokens routed to it",
        "arXiv 2510.13999",
        "S_j = (1 / |T_j|) Σ_{t ∈ T_j} g_j(t) ‖f_j(t)‖; 0 for an expert that no token uses",
        by_statistics=lambda seen: seen.outputs_LE / np.maximum(seen.slots_LE, 1),
    ),
    Criterion(
        "easy-ep", "sum of routing weight x output length x how far the token turns",
        "arXiv 2504.06792",
        "S_j = Σ_{t ∈ T_j} c(t) g_j(t) ‖f_j(t)‖, where c(t) = 1 − cos(h(t) − y(t), h(t))",
        by_statistics=lambda seen: seen.changes_LE,
    ),
    Criterion(
        "output-sum", "sum of routing weight x output length: REAP without the mean", "ours",
        "S_j = Σ_{t ∈ T_j} g_j(t) ‖f_j(t)‖",
        by_statistics=lambda seen: seen.outputs_LE,
    ),
    Criterion(
        "output-error", "greedily by the error of the layer's output", "arXiv 2402.14800",
        "S_j = the step in which expert j goes: see output_error.py",
        by_model=output_errors,
    ),
):  # fmt: skip
    CRITERIA[_each.name] = _each


class Watch:
    """Adds up what the experts of a model do while it runs."""

    def __init__(self, layers: int, experts: int) -> None:
        self._sums = np.zeros((4, layers, experts))
        self._largest = np.zeros((layers, experts))
        self._tokens = [0] * layers
        self.real_T: Tensor | None = None
        """True for tokens of the coming call that are no padding; None for all of them."""

    def result(self) -> ExpertStatistics:
        """All that was seen.

        Raises LeanMoeError if that is nothing, and, naming the layer, if it is no finite number.
        """
        if not min(self._tokens):
            raise LeanMoeError("no text was run: there is nothing to rank experts by")
        is_bad_LE = ~np.isfinite(self._sums).all(axis=0) | ~np.isfinite(self._largest)
        if is_bad_LE.any():
            layer = int(np.argwhere(is_bad_LE)[0, 0])
            own = np.flatnonzero(~np.isfinite(self._largest[layer]))
            where = f"MoE layer {layer}" + (f", expert {own[0]}" if len(own) else "")
            raise LeanMoeError(
                f"{where}: outputs on the text are not finite numbers, so nothing can be ranked; "
                "check the weights, or set --dtype float32"
            )
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
        for expert, rows_X, slots_X, out_XD in layer.outputs_by_expert(hidden_TD, ids_TK):
            gates_X = weights_TK[rows_X, slots_X].double()
            added_X = gates_X * out_XD.double().norm(dim=-1)
            turned = float((added_X * change_T[rows_X].double()).sum())
            values = (float(len(rows_X)), float(gates_X.sum()), float(added_X.sum()), turned)
            self._sums[:, layer.number, expert] += values
            largest = float(out_XD.abs().max())
            before = self._largest[layer.number, expert]
            self._largest[layer.number, expert] = np.maximum(before, largest)  # NaN stays NaN


def observe(model: Any, windows: Windows) -> ExpertStatistics:
    """What the experts of a model do on the windows, padding left out."""
    with watch(model) as watching, bar("Watching experts", windows.tokens, "tokens") as advance:
        for batch in windows.batches():
            watching.real_T = batch.mask_SN.reshape(-1)
            final_hidden(model, batch)
            advance(batch.tokens)
    return watching.result()


@contextmanager
def watch(model: Any) -> Iterator[Watch]:
    """Within it, every forward call of `model` is watched; nothing it computes changes."""
    shape, layers = shape_of(model), find_layers(model)
    decoders = decoder_layers(model)
    watching = Watch(len(layers), shape.experts)
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
                    if flat_TD.numel() != routed_TD.numel():
                        streams = f"{layer.name}: its model keeps several residual streams"
                        raise LeanMoeError(f"{streams}, which rank no expert: set --criterion odd")
                    watching.add(layer, inputs, routed_TD.reshape(flat_TD.shape), flat_TD)

            hooks.callback(layer.experts.register_forward_hook(caught).remove)
            decoder = decoders[layer.decoder_index]
            hooks.callback(decoder.register_forward_hook(done).remove)
        yield watching


def kept_count(text: str, shape: MoEShape) -> int:
    """How many experts of a layer remain: "75%" of them, or a number; down to whole groups.

    Raises LeanMoeError for what is no such number, and where the model could not run with it.
    """
    try:
        wanted = float(text[:-1]) / 100 * shape.experts if text.endswith("%") else int(text)
    except ValueError as error:
        raise LeanMoeError(
            f"keep is {text!r}: it must be a share like 75% or a number of experts"
        ) from error
    groups = shape.router.groups
    kept = int(wanted / groups + 1e-9) * groups if 0 < wanted <= shape.experts else 0
    if not kept:
        whole = "" if groups == 1 else f", as many in each of {groups} groups"
        raise LeanMoeError(
            f"keep is {text!r}: it must leave {groups} to {shape.experts} experts a layer{whole}"
        )
    check_count(kept, shape)
    return kept


def check_count(kept: int, shape: MoEShape) -> None:
    """Raises LeanMoeError unless stock engines can run the model with so many experts a layer."""
    groups, used = shape.router.groups, shape.router.groups_used
    if kept % groups:
        raise LeanMoeError(f"{kept} experts do not divide into the router's {groups} groups")
    usable = kept if groups == 1 else kept // groups * used
    if usable < shape.top_k:
        where = "" if groups == 1 else f" in the {used} groups a token may use"
        raise LeanMoeError(
            f"keeping {kept} of {shape.experts} experts leaves {usable}{where}: "
            f"a token needs {shape.top_k}"
        )
    if groups > 1 and shape.router.group_score == "top2_sum" and kept // groups < 2:
        raise LeanMoeError(
            f"keeping {kept} of {shape.experts} experts leaves 1 in each of {groups} groups: "
            "the router ranks a group by its best 2"
        )


def best_experts(
    scores_LE: Scores,
    kept: int,
    shape: MoEShape,
    protected: Sequence[tuple[int, int]] = (),
) -> Kept:
    """The experts of highest score, `kept` in each layer and equally many in each group.

    `protected` are pairs of layer and expert that stay whatever their score. Equal scores: the
    lower id. Raises LeanMoeError where more are protected than may remain.
    """
    groups = shape.router.groups
    size = shape.experts // groups
    each = kept // groups
    scores_LE = scores_LE.astype(np.float64, copy=True)
    for layer, expert in protected:
        scores_LE[layer, expert] = np.inf
    found = []
    for layer, scores_E in enumerate(scores_LE):
        chosen: list[int] = []
        for first in range(0, shape.experts, size):
            group_E = scores_E[first : first + size]
            if (fixed := int(np.isposinf(group_E).sum())) > each:
                raise LeanMoeError(
                    f"MoE layer {layer} has {fixed} protected experts where {each} may remain"
                )
            order = np.argsort(-group_E, kind="stable")
            chosen += [first + int(expert) for expert in order[:each]]
        found.append(tuple(sorted(chosen)))
    return tuple(found)


def as_plan(kept: Kept, shape: MoEShape, provenance: dict[str, object] | None = None) -> Plan:
    """A plan that uses these experts alone, at every load: no weights are touched."""
    rules = tuple(Rule(experts=experts) for experts in kept)
    return replace(Plan.per_layer(shape.fingerprint(), rules), provenance=provenance or {})


def restricted(plan: Plan, kept: Kept) -> Plan:
    """The plan with these experts alone, at every load: steps beyond its last band too."""

    def rules(those: Sequence[Rule]) -> tuple[Rule, ...]:
        return tuple(_restricted(rule, ids) for rule, ids in zip(those, kept, strict=True))

    bands = [Band(band.up_to, rules(band.rules)) for band in plan.bands]
    if not bands or bands[-1].up_to is not None:
        bands.append(Band(None, rules([Rule()] * len(kept))))
    prompt = rules(plan.prompt) if plan.prompt else ()
    return plan.with_level(bands=tuple(bands), prompt=prompt)


def _restricted(rule: Rule, kept: tuple[int, ...]) -> Rule:
    def within(budget: int | None) -> int | None:
        return None if budget is None else min(budget, len(kept))

    return replace(
        rule,
        experts=kept,
        budget=within(rule.budget),
        budget_per_rank=within(rule.budget_per_rank),
    )
