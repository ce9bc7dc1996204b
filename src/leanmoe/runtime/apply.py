"""`with leanmoe.apply(model, plan):` runs a model under a plan and leaves it as it was."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from leanmoe.errors import LeanMoeError
from leanmoe.families import Router
from leanmoe.plan import Plan
from leanmoe.routing import route
from leanmoe.runtime.counts import LayerCounts
from leanmoe.runtime.experts import IMPLEMENTATION, prepared, register_experts
from leanmoe.runtime.layers import MoELayer, find_layers, router_logits, shape_of
from leanmoe.runtime.step import Part, scoring_parts, served_parts

logger = logging.getLogger(__name__)
_MARK = "_leanmoe_applied"

Experts = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass
class Applied:
    """A plan at work: what runs, and what it did."""

    plan: Plan
    implementation: str
    """Which experts implementation computes the chosen experts."""
    generated: tuple[LayerCounts, ...] = ()
    """Per MoE layer, for tokens whose prediction is read; filled with `count=True`."""
    prompt: tuple[LayerCounts, ...] = ()
    """The same for prompt tokens."""


@dataclass
class _Call:
    """What is known of the forward call that is running."""

    parts: tuple[Part, ...] | None = None
    read: Any = None
    logits: dict[int, Tensor] = field(default_factory=dict)


@contextmanager
def apply(
    model: Any,
    plan: Plan,
    *,
    experts: str = "stock",
    decode_batch: int | None = None,
    prompt_tokens: int | None = None,
    count: bool = False,
    more_experts: bool = False,
) -> Iterator[Applied]:
    """Runs `model` under `plan` inside the `with`; undone on exit, after an exception too.

    Args:
        model: a causal language model of Transformers, of a family in `families.py`.
        plan: an empty plan leaves the model's output as it is, bit for bit.
        experts: "stock" keeps the model's experts implementation; "leanmoe" uses our kernels.
        decode_batch: for scoring whole sequences: every position of every `decode_batch`
            sequences is a decode step of its own, so rules that depend on a token's company see
            the company of a service at that concurrency.
        prompt_tokens: for scoring whole sequences: the first so many tokens of each are a
            prompt, whose predictions are not read. Not set: a call says so itself by asking for
            few logits (`logits_to_keep`), as `generate` and continuous batching do.
        count: fills in the counts of `Applied`.
        more_experts: allows rules with more experts than the model was trained with.

    Raises LeanMoeError when the plan is for another model, a rule is out of range, the model
    cannot be run, or another plan is applied to it already.
    """
    shape = shape_of(model)
    plan.check(shape.fingerprint(), more_experts)
    if experts not in ("stock", IMPLEMENTATION):
        raise LeanMoeError(f"experts is {experts!r}: it must be 'stock' or '{IMPLEMENTATION}'")
    if getattr(model, _MARK, False):
        raise LeanMoeError("a plan is applied to this model already: leave its `with` first")
    layers = find_layers(model)
    scoring = (
        None
        if decode_batch is None and prompt_tokens is None
        else (
            decode_batch,
            prompt_tokens or 0,
        )
    )
    before = model.config._experts_implementation
    setattr(model, _MARK, True)
    undo: list[Callable[[], object]] = [lambda: delattr(model, _MARK)]
    try:
        if experts == IMPLEMENTATION:
            register_experts()
            undo.append(lambda: model.set_experts_implementation(before))
            model.set_experts_implementation(IMPLEMENTATION)
        applied = Applied(plan, _implementation(model, layers))
        if count:
            applied.generated = tuple(LayerCounts() for _ in layers)
            applied.prompt = tuple(LayerCounts() for _ in layers)
        if count or not plan.is_empty:
            _hook(model, plan, layers, shape.router, applied, scoring, undo)
        logger.info(
            "plan applied to %s, experts run by %s", type(model).__name__, applied.implementation
        )
        yield applied
    finally:
        for step in reversed(undo):
            step()


def _implementation(model: Any, layers: tuple[MoELayer, ...]) -> str:
    name = str(model.config._experts_implementation)
    if name == IMPLEMENTATION:
        return f"{IMPLEMENTATION} {prepared(layers[0].experts)[1].name}"
    return name


def _hook(
    model: Any,
    plan: Plan,
    layers: tuple[MoELayer, ...],
    router: Router,
    applied: Applied,
    scoring: tuple[int | None, int] | None,
    undo: list[Callable[[], object]],
) -> None:
    call = _Call()

    def note_read(_module: nn.Module, _inputs: Any, keywords: dict[str, Any]) -> None:
        call.read = keywords.get("logits_to_keep")

    def note_step(_module: nn.Module, inputs: Any, keywords: dict[str, Any]) -> None:
        tokens = keywords.get("input_ids", inputs[0] if inputs else None)
        tokens = keywords.get("inputs_embeds") if tokens is None else tokens
        if tokens is None:
            raise LeanMoeError("a plan needs input_ids or inputs_embeds in the model's call")
        shape_NL = (int(tokens.shape[0]), int(tokens.shape[1]))
        padding_NL = _padding(keywords.get("attention_mask"), shape_NL[1])
        call.logits.clear()
        if scoring is None:
            call.parts = served_parts(plan, shape_NL, padding_NL, call.read)
        else:
            call.parts = scoring_parts(plan, shape_NL, padding_NL, *scoring)

    def forget(_module: nn.Module, _inputs: Any, _output: Any) -> None:
        call.parts = call.read = None

    undo.append(model.register_forward_pre_hook(note_read, with_kwargs=True).remove)
    undo.append(model.register_forward_hook(forget, always_call=True).remove)
    undo.append(model.base_model.register_forward_pre_hook(note_step, with_kwargs=True).remove)
    for layer in layers:
        undo.append(_hook_layer(layer, router, plan.model.top_k, call, applied))


def _hook_layer(
    layer: MoELayer, router: Router, top_k: int, call: _Call, applied: Applied
) -> Callable[[], None]:
    def note_logits(_module: nn.Module, _inputs: Any, output: Any) -> None:
        call.logits[layer.number] = router_logits(output)

    stock: Experts = layer.experts.forward

    def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        if call.parts is None or layer.number not in call.logits:
            raise LeanMoeError(
                f"{layer.name}: its experts ran without its router in the same forward call"
            )
        logits_TE = call.logits.pop(layer.number).flatten(0, -2)
        ids_TK, weights_TK, skips = _choose(
            layer, logits_TE, top_k_index, top_k_weights, router, top_k, call.parts, applied
        )
        if not skips or layer.experts.config._experts_implementation == IMPLEMENTATION:
            return stock(hidden_states, ids_TK, weights_TK)
        return _without_skipped(stock, hidden_states, ids_TK, weights_TK, top_k_experts(layer))

    handle = layer.router.register_forward_hook(note_logits)
    layer.experts.forward = forward

    def undo() -> None:
        handle.remove()
        del layer.experts.forward

    return undo


def top_k_experts(layer: MoELayer) -> int:
    """How many experts the layer's experts module holds: the id of a skipped slot."""
    return int(layer.experts.num_experts)


def _choose(
    layer: MoELayer,
    logits_TE: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    router: Router,
    top_k: int,
    parts: tuple[Part, ...],
    applied: Applied,
) -> tuple[Tensor, Tensor, bool]:
    """Ids and weights under the parts' rules, and whether any slot may be skipped."""
    experts = logits_TE.shape[-1]
    bias_E = layer.ranking_bias(router)
    skips = False
    chosen = []
    for part in parts:
        rule = part.rules[layer.number]
        index = part.index_ST
        if rule.is_empty:
            routed = (ids_TK, weights_TK) if index is None else (ids_TK[index], weights_TK[index])
        else:
            logits = logits_TE if index is None else logits_TE[index]
            routing = route(logits, router, top_k, rule, bias_E, part.padding_ST)
            routed = (routing.ids_STK, routing.weights_STK.to(weights_TK.dtype))
            skips = (
                skips
                or part.padding_ST is not None
                or rule.top_k is None
                or (len([v for v in rule.to_json() if v != "top_k"]) > 0)
                or rule.top_k == 0
            )
            _note_budget(routing.over_budget_S, layer, part, applied)
        chosen.append(routed)
        _note_counts(routed[0], layer, part, applied, experts)
    if len(parts) == 1 and parts[0].index_ST is None:
        return (*chosen[0], skips)
    return (*_joined(parts, chosen, ids_TK, weights_TK, experts), True)


def _joined(
    parts: tuple[Part, ...],
    chosen: list[tuple[Tensor, Tensor]],
    ids_TK: Tensor,
    weights_TK: Tensor,
    experts: int,
) -> tuple[Tensor, Tensor]:
    """Puts the parts' slots back in token order, with as many slots as the widest part has."""
    slots = max(ids.shape[-1] for ids, _ in chosen)
    all_ids_TK = ids_TK.new_full((ids_TK.shape[0], slots), experts)
    all_weights_TK = weights_TK.new_zeros((ids_TK.shape[0], slots))
    for part, (ids, weights) in zip(parts, chosen, strict=True):
        assert part.index_ST is not None
        index = part.index_ST.flatten()
        width = ids.shape[-1]
        all_ids_TK[index, :width] = ids.reshape(-1, width)
        all_weights_TK[index, :width] = weights.reshape(-1, width)
    return all_ids_TK, all_weights_TK


def _without_skipped(
    stock: Experts, hidden_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, experts: int
) -> Tensor:
    """Runs an implementation that knows no skipped slots on the slots that are left.

    Each is a token of its own with one slot, so that skipped ones cost no row and leak no NaN.
    """
    token_R, slot_R = (ids_TK < experts).nonzero(as_tuple=True)
    out_TD = torch.zeros_like(hidden_TD)
    if len(token_R):
        rows_RD = stock(
            hidden_TD[token_R],
            ids_TK[token_R, slot_R].unsqueeze(-1),
            weights_TK[token_R, slot_R].unsqueeze(-1),
        )
        out_TD.index_add_(0, token_R, rows_RD.to(out_TD.dtype))
    return out_TD


def _note_counts(ids: Tensor, layer: MoELayer, part: Part, applied: Applied, experts: int) -> None:
    if not applied.generated:
        return
    counts = (applied.prompt if part.is_prompt else applied.generated)[layer.number]
    ids_STK = ids if ids.dim() == 3 else ids.unsqueeze(0)
    padding_ST = part.padding_ST
    if padding_ST is not None and padding_ST.dim() == 1:
        padding_ST = padding_ST.unsqueeze(0)
    counts.add(ids_STK, padding_ST, experts)


def _note_budget(over_S: Tensor | None, layer: MoELayer, part: Part, applied: Applied) -> None:
    if over_S is not None and applied.generated:
        counts = (applied.prompt if part.is_prompt else applied.generated)[layer.number]
        counts.over_budget_steps += int(over_S.sum())


def _padding(mask: Any, length: int) -> Tensor | None:
    """True where the call's tokens are padding, from a 2-d attention mask over cache and call."""
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return None
    return mask[:, -length:] == 0
