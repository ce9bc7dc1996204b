"""`with leanmoe.apply(model, plan):` runs a model under a plan and leaves it as it was."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from leanmoe.core.errors import LeanMoeError
from leanmoe.models.routers import Router
from leanmoe.plan import Plan
from leanmoe.plan.placement import Placement
from leanmoe.routing import BatchScope
from leanmoe.runtime.counts import RoutingCounts
from leanmoe.runtime.model import MoELayer, find_layers, router_logits, shape_of
from leanmoe.runtime.routing import (
    Experts,
    FastRouter,
    LayerRouting,
    Observe,
    fast_router,
    without_skipped,
)
from leanmoe.runtime.step import StepPart, scoring_parts, served_parts
from leanmoe.runtime.transformers_experts import IMPLEMENTATION, prepared, register_experts

logger = logging.getLogger(__name__)
_MARK = "_leanmoe_applied"


@dataclass
class Applied:
    """A plan at work: what runs, and what it did."""

    plan: Plan
    implementation: str
    """Which experts implementation computes the chosen experts."""
    generated: tuple[RoutingCounts, ...] = ()
    """Per MoE layer, for tokens whose prediction is read; filled with `count=True`."""
    prompt: tuple[RoutingCounts, ...] = ()
    """The same for prompt tokens."""


@dataclass
class _Call:
    """The forward call that is running: its parts, which logits are read, and each layer's own."""

    parts: tuple[StepPart, ...] | None = None
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
    placement: Placement | None = None,
    observe: Observe | None = None,
) -> Iterator[Applied]:
    """Runs `model` under `plan` inside the `with`; undone on exit, after an exception too.

    Args:
        model: a causal language model of Transformers, of a family in `families.py`.
        plan: an empty plan leaves the model's output as it is, bit for bit.
        experts: "stock" keeps the model's experts implementation; "leanmoe" uses our kernels.
        decode_batch: for scoring whole sequences: every position of every `decode_batch`
            sequences is a decode step of its own, so batch-aware rules see as many tokens as in a
            service at that concurrency.
        prompt_tokens: for scoring whole sequences: the first so many tokens of each are a
            prompt, whose predictions are not read. Not set: a call says so itself by asking for
            few logits (`logits_to_keep`), as `generate` and continuous batching do.
        count: fills in the counts of `Applied`.
        placement: the ranks that experts would be on in a service, for `budget_per_rank`; this
            process computes them all. Not set: one rank.
        observe: called by each MoE layer in each step with what it chose; a skipped slot has
            weight 0.

    Raises LeanMoeError when the plan is for another model, a rule or the placement is out of
    range, the model cannot be run, or another plan is applied to it already.
    """
    router = _check(model, plan, experts, placement)
    layers = find_layers(model)
    scores = decode_batch is not None or prompt_tokens is not None
    scoring = (decode_batch, prompt_tokens or 0) if scores else None
    before = model.config._experts_implementation
    setattr(model, _MARK, True)
    undo: list[Callable[[], object]] = [lambda: delattr(model, _MARK)]
    try:
        if experts == IMPLEMENTATION:
            prepared(layers[0].experts)  # refused here, before anything is changed
            register_experts()
            undo.append(lambda: model.set_experts_implementation(before))
            model.set_experts_implementation(IMPLEMENTATION)
        applied = Applied(plan, _implementation(model, layers))
        if count:
            applied.generated = tuple(RoutingCounts() for _ in layers)
            applied.prompt = tuple(RoutingCounts() for _ in layers)
        if count or observe or not plan.is_empty or experts == IMPLEMENTATION:
            call, scope = _Call(), BatchScope(placement)
            _hook_model(model, plan, scoring, call, undo)
            for layer in layers:
                how = _layer_routing(model, applied, layer, router, scope, observe)
                undo.append(_hook_layer(layer, how, call))
        logger.info(
            "plan applied to %s, experts run by %s", type(model).__name__, applied.implementation
        )
        yield applied
    finally:
        for step in reversed(undo):
            step()


def has_kernel(model: Any) -> bool:
    """Whether every MoE layer of the model is computed by a kernel and not by the reference."""
    return all(layer.has_kernel for layer in find_layers(model))


def served_experts(model: Any) -> str:
    """The experts that measurements use: ours where a kernel computes them, else Transformers'.

    Our plain reference would make a slow full model, and any plan look fast beside it.
    """
    return IMPLEMENTATION if has_kernel(model) else "stock"


def _implementation(model: Any, layers: tuple[MoELayer, ...]) -> str:
    name = str(model.config._experts_implementation)
    if name == IMPLEMENTATION:
        return f"{IMPLEMENTATION} {prepared(layers[0].experts)[1].name}"
    return name


def _check(model: Any, plan: Plan, experts: str, placement: Placement | None) -> Router:
    """The model's router; raises LeanMoeError for what `apply` cannot do."""
    shape = shape_of(model)
    plan.check(shape.fingerprint())
    if placement is not None:
        placement.check(plan.model.experts)
    if experts not in ("stock", IMPLEMENTATION):
        raise LeanMoeError(f"experts is {experts!r}: it must be 'stock' or '{IMPLEMENTATION}'")
    if getattr(model, _MARK, False):
        raise LeanMoeError("a plan is applied to this model already: leave its `with` first")
    is_placed = placement is not None and placement.ranks > 1 and plan.has_budget_per_rank
    is_fast = IMPLEMENTATION in (experts, model.config._experts_implementation)
    if is_placed and is_fast and model.device.type != "cuda":
        logger.warning("rules with budget_per_rank are routed by the reference, in plain torch")
    return shape.router


def _hook_model(
    model: Any,
    plan: Plan,
    scoring: tuple[int | None, int] | None,
    call: _Call,
    undo: list[Callable[[], object]],
) -> None:
    """Fills in `call` before each forward of the model's layers, and empties it after."""

    def note_read(_module: nn.Module, _inputs: Any, keywords: dict[str, Any]) -> None:
        call.read = keywords.get("logits_to_keep")

    def note_step(_module: nn.Module, inputs: Any, keywords: dict[str, Any]) -> None:
        tokens = keywords.get("input_ids", inputs[0] if inputs else None)
        tokens = keywords.get("inputs_embeds") if tokens is None else tokens
        if tokens is None:
            raise LeanMoeError("a plan needs input_ids or inputs_embeds in the model's call")
        shape_SN = (int(tokens.shape[0]), int(tokens.shape[1]))
        padding_SN = _padding(keywords.get("attention_mask"), shape_SN[1])
        call.logits.clear()
        if scoring is None:
            call.parts = served_parts(plan, shape_SN, padding_SN, call.read)
        else:
            call.parts = scoring_parts(plan, shape_SN, padding_SN, *scoring)

    def forget(_module: nn.Module, _inputs: Any, _output: Any) -> None:
        call.parts = call.read = None

    undo.append(model.register_forward_pre_hook(note_read, with_kwargs=True).remove)
    undo.append(model.register_forward_hook(forget, always_call=True).remove)
    undo.append(model.base_model.register_forward_pre_hook(note_step, with_kwargs=True).remove)


def _layer_routing(
    model: Any,
    applied: Applied,
    layer: MoELayer,
    router: Router,
    scope: BatchScope,
    observe: Observe | None,
) -> LayerRouting:
    number, counts = layer.number, None
    if applied.generated:
        counts = (applied.generated[number], applied.prompt[number])
    return LayerRouting(
        number,
        router,
        applied.plan.model.top_k,
        layer.expert_count,
        layer.ranking_bias(router),
        layer.expert_scale(router),
        model.config._experts_implementation == IMPLEMENTATION,
        counts,
        scope,
        observe,
    )


def _hook_layer(layer: MoELayer, how: LayerRouting, call: _Call) -> Callable[[], None]:
    fast = fast_router(layer, how.router, how.top_k) if how.is_fast else None
    if fast is not None:
        return _replace_router(layer, fast, how, call)

    def note_logits(_module: nn.Module, _inputs: Any, output: Any) -> None:
        call.logits[layer.number] = router_logits(output)

    stock: Experts = layer.experts.forward

    def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        if call.parts is None or layer.number not in call.logits:
            raise LeanMoeError(
                f"{layer.name}: its experts ran without its router in the same forward call"
            )
        logits_TE = call.logits.pop(layer.number).flatten(0, -2)
        ids_TK, weights_TK, skips = how.choose(logits_TE, (top_k_index, top_k_weights), call.parts)
        if not skips or how.is_fast:
            return stock(hidden_states, ids_TK, weights_TK)
        has_identity = how.router.zero_experts > 0
        return without_skipped(stock, hidden_states, ids_TK, weights_TK, how.experts, has_identity)

    handle = layer.logits_source(how.router).register_forward_hook(note_logits)
    layer.experts.forward = forward

    def undo() -> None:
        handle.remove()
        del layer.experts.forward

    return undo


def _replace_router(
    layer: MoELayer, fast: FastRouter, how: LayerRouting, call: _Call
) -> Callable[[], None]:
    """Our experts know skipped slots, so a plan's choice can come from the router itself."""

    def choose(logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        if call.parts is None:
            raise LeanMoeError(f"{layer.name}: its router ran outside of the model's forward call")
        ids_TK, weights_TK, _ = how.choose(logits_TE, None, call.parts)
        return ids_TK, weights_TK

    def forward(hidden_states: Tensor) -> tuple[Tensor, ...]:
        return fast.forward(hidden_states, choose)

    layer.router.forward = forward

    def undo() -> None:
        del layer.router.forward

    return undo


def _padding(mask: Any, length: int) -> Tensor | None:
    """True where the call's tokens are padding.

    From a 2-d attention mask over cache and call, or a 4-d one over a call without cache, where a
    token that may not even see itself is padding.
    """
    if not isinstance(mask, Tensor):
        return None
    if mask.dim() == 2:
        return mask[:, -length:] == 0
    if mask.dim() == 4 and mask.shape[-2:] == (length, length):
        itself = mask[:, 0].diagonal(dim1=-2, dim2=-1)
        hidden = ~itself if itself.dtype == torch.bool else itself < 0
        return hidden if bool(hidden.any()) else None
    return None
