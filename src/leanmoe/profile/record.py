"""What a model's router does on text: recorded in one pass, and routed again under any rule.

Recording counts chunk by chunk, so that nothing but a sample of router logits is kept. A decode
step of T requests holds one token of each of T documents: steps are drawn so from the sample, the
same ones for the same seed whatever the rule, and routed by the same code as the model's own.

Letters: B steps, T tokens of a batch or a step, E experts, K slots of a token, L MoE layers, S
windows, N tokens of a window, U documents.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from leanmoe.core.errors import LeanMoeError
from leanmoe.core.provenance import collect
from leanmoe.kernels.dispatch import fast_route
from leanmoe.models.families import Router
from leanmoe.models.shape import distinct_uniform
from leanmoe.plan import Rule
from leanmoe.profile.saved import Distinct, Profile, Trace
from leanmoe.routing import (
    ALONE,
    BatchScope,
    count_distinct,
    count_distinct_by_rank,
    count_slots,
    score,
)
from leanmoe.runtime import find_layers, record, shape_of
from leanmoe.scoring.divergence import hidden_of
from leanmoe.scoring.windows import BATCH_TOKENS, WindowBatch, Windows

TRACE_TOKENS = 16384


def profile(
    model: Any,
    windows: Windows,
    trace_tokens: int = TRACE_TOKENS,
    batch_tokens: int = BATCH_TOKENS,
    seed: int = 0,
    command: str = "profile",
) -> Profile:
    """Runs `model` over `windows` once and counts, per MoE layer, what its router chooses.

    Router logits of about `trace_tokens` tokens are kept (float16, 2 L E bytes each), as many of
    each document as of any other, none of them a window's first token: that is the only one that
    is never part of a decode step. Nothing but an empty plan may be applied at the time.

    Raises LeanMoeError, naming the layer, when a router logit is not a finite number.
    """
    shape = shape_of(model)
    layers = find_layers(model)
    biases = [layer.ranking_bias(shape.router) for layer in layers]
    use_LE = torch.zeros((len(layers), shape.experts), dtype=torch.int64)
    mass_LK = torch.zeros((len(layers), shape.top_k), dtype=torch.float64)
    sample = _Sample(windows, trace_tokens, seed)
    caught: dict[int, Tensor] = {}

    def sink(layer: int, logits_TE: Tensor) -> None:
        caught[layer] = logits_TE

    with record(model, sink):
        for batch, _ in hidden_of(model, windows, "Profile", batch_tokens):
            real_T = batch.mask_SN.reshape(-1)
            logits_LTE = [
                caught.pop(n).reshape(-1, shape.experts)[real_T] for n in range(len(layers))
            ]
            for n, logits_TE in enumerate(logits_LTE):
                use_E, mass_K = count_choices(logits_TE, shape.router, shape.top_k, biases[n])
                use_LE[n] += use_E
                mass_LK[n] += mass_K
            sample.add(batch, logits_LTE)
    measured = Profile(
        model=shape.fingerprint(),
        router=shape.router,
        decoder_indices=tuple(layer.decoder_index for layer in layers),
        tokens=windows.tokens,
        documents=windows.documents,
        use_LE=use_LE.numpy(),
        mass_LK=(mass_LK / windows.tokens).numpy(),
        distinct=(),
        trace=sample.trace(),
        bias_LE=_stack(biases),
        provenance=collect(command, seed).to_json(),
    )
    curves = tuple(distinct_curve(measured, layer, seed) for layer in range(len(layers)))
    return replace(measured, distinct=curves)


class _Sample:
    """Router logits of a sample of tokens, gathered batch by batch."""

    def __init__(self, windows: Windows, tokens: int, seed: int) -> None:
        self._windows = windows
        self._chosen_NL = _choose(windows, tokens, seed)
        self._logits: list[Tensor] = []
        self._rows: list[Tensor] = []
        self._positions: list[Tensor] = []

    def add(self, batch: WindowBatch, logits_LTE: list[Tensor]) -> None:
        """Keeps the chosen ones of a batch's tokens [T], padding left out."""
        width = batch.ids_SN.shape[1]
        chosen_NL = self._chosen_NL[batch.rows_S, :width]
        chosen_T = chosen_NL[batch.mask_SN]
        self._logits.append(torch.stack([logits[chosen_T].half().cpu() for logits in logits_LTE]))
        rows, positions = chosen_NL.nonzero(as_tuple=True)
        self._rows.append(batch.rows_S[rows])
        self._positions.append(positions)

    def trace(self) -> Trace:
        """All that was kept, sorted by document."""
        rows_T, positions_T = torch.cat(self._rows), torch.cat(self._positions)
        documents_T = self._windows.documents_S[rows_T]
        order_T = documents_T.argsort(stable=True)
        logits_LTE = torch.cat(self._logits, dim=1)[:, order_T]
        return Trace(
            logits_LTE.numpy(),
            documents_T[order_T].numpy().astype(np.int32),
            positions_T[order_T].numpy().astype(np.int32),
        )


def _choose(windows: Windows, tokens: int, seed: int) -> Tensor:
    """True [N, L] at about `tokens` tokens: equally many of each document, while it has them."""
    draw = torch.Generator().manual_seed(seed)
    possible_NL = windows.mask.clone()
    possible_NL[:, 0] = False
    rows, positions = possible_NL.nonzero(as_tuple=True)
    shuffled = torch.randperm(len(rows), generator=draw)
    documents = windows.documents_S[rows[shuffled]]
    by_document = documents.argsort(stable=True)
    sizes = torch.bincount(documents, minlength=windows.documents)
    starts = sizes.cumsum(0) - sizes
    turn = torch.arange(len(rows)) - starts.repeat_interleave(sizes)
    kept = shuffled[by_document][turn.argsort(stable=True)[:tokens]]
    chosen_NL = torch.zeros_like(possible_NL)
    chosen_NL[rows[kept], positions[kept]] = True
    return chosen_NL


def _stack(biases: list[Tensor | None]) -> Any:
    found = [bias.detach().float().cpu() for bias in biases if bias is not None]
    return torch.stack(found).numpy() if found else None


@torch.inference_mode()
def count_choices(
    logits_TE: Tensor, router: Router, top_k: int, bias_E: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What the model's own router makes of these tokens, on the CPU; no padding among them.

    How many choose each expert [E], and summed over tokens [K], float64, the share of a token's
    gates that its best j carry, in the order the router ranks them.
    """
    scores = score(logits_TE, router, bias_E)
    ids_TK = scores.ranking_BTE.topk(top_k, dim=-1).indices
    gates_TK = scores.gates_BTE.gather(-1, ids_TK).double()
    if router.scoring == "softmax_after_top_k":
        gates_TK = gates_TK.softmax(-1)
    use_E = torch.bincount(ids_TK.reshape(-1), minlength=logits_TE.shape[-1])
    share_TK = gates_TK.cumsum(-1) / gates_TK.sum(-1, keepdim=True)
    return use_E.cpu(), share_TK.sum(0).cpu()


BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
REPLAYED_TOKENS = 16384
MINIMUM_STEPS = 64


@dataclass(frozen=True)
class Replay:
    """What decode steps of a profiled layer activate under a rule."""

    tokens: int
    """In a step."""
    documents: int
    """That a step's tokens are from."""
    steps: int
    slots: float
    """Mean experts a token uses."""
    distinct: float
    """Mean distinct experts a step uses."""
    distinct_error: float
    """Standard error of `distinct` over the steps."""
    most_loaded: float
    """Mean distinct experts of the rank that activates the most, as experts were placed."""
    over_budget: float
    """Share of steps in which every token's best expert needed more than the rule's budget."""


def replay(
    profile: Profile,
    layer: int,
    rule: Rule,
    tokens_in_step: int,
    steps: int | None = None,
    seed: int = 0,
    scope: BatchScope = ALONE,
    scopes: int = 1,
) -> Replay:
    """Routes decode steps of `tokens_in_step` tokens through MoE layer `layer` under `rule`.

    `scope` says where the experts lie, by default on one rank. A step's tokens belong evenly to so
    many batch `scopes`; tokens share experts within their own.

    Where there are fewer documents than tokens in a step, each gives several tokens. By default as
    many steps as make 16,384 tokens, and at least 64. Raises LeanMoeError when the sample holds
    fewer tokens than a step, or the layer or the rule is out of range.
    """
    if not 0 <= layer < profile.model.moe_layers:
        raise LeanMoeError(f"layer is {layer}: it must be 0 to {profile.model.moe_layers - 1}")
    rule.check(profile.model, more_experts=True)
    if scopes < 1 or tokens_in_step % scopes:
        raise LeanMoeError(
            f"scopes is {scopes}: it must divide the {tokens_in_step} tokens in a step"
        )
    experts = profile.model.experts
    count = steps or max(MINIMUM_STEPS, REPLAYED_TOKENS // max(tokens_in_step, 1))
    places_BT = draw_steps(profile.trace, tokens_in_step, count, seed)
    logits_TE = torch.from_numpy(profile.trace.logits_LTE[layer])
    bias_E = None if profile.bias_LE is None else torch.from_numpy(profile.bias_LE[layer])
    logits_BTE = logits_TE[places_BT.view(count * scopes, -1)].float()
    routing = fast_route(logits_BTE, profile.router, profile.model.top_k, rule, bias_E, scope=scope)
    over = routing.over_budget_B
    ids_BTK = routing.ids_BTK.view(count, tokens_in_step, -1)
    distinct_B = most_B = count_distinct(ids_BTK, experts).double()
    if scope.placement is not None:
        most_B = count_distinct_by_rank(ids_BTK, scope.placement).amax(dim=-1).double()
    return Replay(
        tokens=tokens_in_step,
        documents=min(tokens_in_step, profile.trace.documents),
        steps=count,
        slots=float(count_slots(ids_BTK, experts).sum()) / places_BT.numel(),
        distinct=float(distinct_B.mean()),
        distinct_error=float(distinct_B.std(correction=0)) / math.sqrt(count),
        most_loaded=float(most_B.mean()),
        over_budget=0.0 if over is None else float(over.double().mean()),
    )


def distinct_curve(profile: Profile, layer: int, seed: int = 0) -> tuple[Distinct, ...]:
    """Distinct experts of the full model over batch size, beside the formula for even use."""
    model = profile.model
    points = []
    for tokens in (size for size in BATCH_SIZES if size <= profile.trace.tokens):
        activity = replay(profile, layer, Rule(), tokens, seed=seed)
        uniform = distinct_uniform(model.experts, model.top_k, tokens)
        points.append(
            Distinct(
                tokens, activity.documents, activity.distinct, activity.distinct_error, uniform
            )
        )
    return tuple(points)


def draw_steps(trace: Trace, tokens_in_step: int, steps: int, seed: int = 0) -> Tensor:
    """Places [B,T] in the trace: in each of B steps a token of each of T documents, at random.

    With fewer than T documents, every document gives a token in turn, and then another one.
    """
    if not 1 <= tokens_in_step <= trace.tokens:
        raise LeanMoeError(
            f"tokens in a step is {tokens_in_step}: it must be 1 to {trace.tokens}, "
            "the tokens that the profile has sampled"
        )
    counts = np.unique(trace.document_T, return_counts=True)[1]
    counts_U = torch.from_numpy(counts)
    starts_U = counts_U.cumsum(0) - counts_U
    draw = torch.Generator().manual_seed(seed)
    rounds = []
    for turn in range(math.ceil(tokens_in_step / len(counts_U))):
        wanted = min(len(counts_U), tokens_in_step - turn * len(counts_U))
        keys_BU = torch.rand((steps, len(counts_U)), generator=draw)
        documents_BT = keys_BU.topk(wanted).indices
        rounds.append(documents_BT)
    documents_BT = torch.cat(rounds, dim=1)
    first_BU = torch.rand((steps, len(counts_U)), generator=draw)
    turn_T = torch.arange(tokens_in_step) // len(counts_U)
    counts_BT = counts_U[documents_BT]
    offset_BT = (first_BU.gather(1, documents_BT) * counts_BT).long() + turn_T
    return starts_U[documents_BT] + offset_BT % counts_BT
