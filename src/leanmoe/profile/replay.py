"""A profile's sample of router logits routed again, as decode steps, under any rule.

A decode step of B requests holds one token of each of B documents. Steps are drawn so from the
sample, the same ones for the same seed whatever the rule, and routed by the same code as the
model's own.

Letters: S steps, B tokens in a step, E experts, K slots a token, T sampled tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from leanmoe.core.errors import LeanMoeError
from leanmoe.kernels.dispatch import fast_route
from leanmoe.models.shape import distinct_uniform
from leanmoe.plan import Rule
from leanmoe.plan.placement import Placement
from leanmoe.profile.saved import Distinct, Profile, Trace
from leanmoe.routing import BatchScope, count_distinct, count_distinct_by_rank, count_slots

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
    """Mean distinct experts of the rank that wakes the most, as experts were placed."""
    over_budget: float
    """Share of steps in which every token's best expert needed more than the rule's budget."""


def replay(
    profile: Profile,
    layer: int,
    rule: Rule,
    tokens_in_step: int,
    steps: int | None = None,
    seed: int = 0,
    placement: Placement | None = None,
    companies: int = 1,
) -> Replay:
    """Routes decode steps of `tokens_in_step` tokens through MoE layer `layer` under `rule`.

    The experts lie as `placement` says, by default on one rank. A step's tokens are those of so
    many `companies`, evenly, each of which shares experts within itself.

    Where there are fewer documents than tokens in a step, each gives several tokens. By default as
    many steps as make 16,384 tokens, and at least 64. Raises LeanMoeError when the sample holds
    fewer tokens than a step, or the layer or the rule is out of range.
    """
    if not 0 <= layer < len(profile.layers):
        raise LeanMoeError(f"layer is {layer}: it must be 0 to {len(profile.layers) - 1}")
    rule.check(profile.model, more_experts=True)
    if companies < 1 or tokens_in_step % companies:
        raise LeanMoeError(
            f"companies is {companies}: it must divide the {tokens_in_step} tokens in a step"
        )
    experts = profile.model.experts
    placed = placement or Placement.linear(experts, 1)
    placed.check(experts)
    count = steps or max(MINIMUM_STEPS, REPLAYED_TOKENS // max(tokens_in_step, 1))
    places_SB = draw_steps(profile.trace, tokens_in_step, count, seed)
    logits_TE = torch.from_numpy(profile.trace.logits_LTE[layer])
    bias_E = None if profile.bias_LE is None else torch.from_numpy(profile.bias_LE[layer])
    places_CB = places_SB.view(count * companies, -1)
    logits_CBE = logits_TE[places_CB].float()
    scope = BatchScope(placed)
    routing = fast_route(logits_CBE, profile.router, profile.model.top_k, rule, bias_E, scope=scope)
    over = routing.over_budget_B
    ids_SBK = routing.ids_BTK.view(count, tokens_in_step, -1)
    distinct_S = count_distinct(ids_SBK, experts).double()
    return Replay(
        tokens=tokens_in_step,
        documents=min(tokens_in_step, profile.trace.documents),
        steps=count,
        slots=float(count_slots(ids_SBK, experts).sum()) / places_SB.numel(),
        distinct=float(distinct_S.mean()),
        distinct_error=float(distinct_S.std(correction=0)) / math.sqrt(count),
        most_loaded=float(count_distinct_by_rank(ids_SBK, placed).amax(dim=-1).double().mean()),
        over_budget=0.0 if over is None else float(over.double().mean()),
    )


def distinct_curve(profile: Profile, layer: int, seed: int = 0) -> tuple[Distinct, ...]:
    """Distinct experts of the full model over batch size, beside the formula for even use."""
    model = profile.model
    points = []
    for tokens in (size for size in BATCH_SIZES if size <= profile.trace.tokens):
        found = replay(profile, layer, Rule(), tokens, seed=seed)
        uniform = distinct_uniform(model.experts, model.top_k, tokens)
        points.append(
            Distinct(tokens, found.documents, found.distinct, found.distinct_error, uniform)
        )
    return tuple(points)


def draw_steps(trace: Trace, tokens_in_step: int, steps: int, seed: int = 0) -> Tensor:
    """Places [S, B] in the trace: one token of each of B documents, both drawn at random.

    With fewer than B documents, every document gives a token in turn, and then another one.
    """
    if not 1 <= tokens_in_step <= trace.tokens:
        raise LeanMoeError(
            f"tokens in a step is {tokens_in_step}: it must be 1 to {trace.tokens}, "
            "the tokens that the profile has sampled"
        )
    counts = np.unique(trace.document_T, return_counts=True)[1]
    counts_D = torch.from_numpy(counts)
    starts_D = counts_D.cumsum(0) - counts_D
    draw = torch.Generator().manual_seed(seed)
    rounds = []
    for turn in range(math.ceil(tokens_in_step / len(counts_D))):
        wanted = min(len(counts_D), tokens_in_step - turn * len(counts_D))
        keys_SD = torch.rand((steps, len(counts_D)), generator=draw)
        documents_SB = keys_SD.topk(wanted).indices
        rounds.append(documents_SB)
    documents_SB = torch.cat(rounds, dim=1)
    first_SD = torch.rand((steps, len(counts_D)), generator=draw)
    turn_B = torch.arange(tokens_in_step) // len(counts_D)
    counts_SB = counts_D[documents_SB]
    offset_SB = (first_SD.gather(1, documents_SB) * counts_SB).long() + turn_B
    return starts_D[documents_SB] + offset_SB % counts_SB
