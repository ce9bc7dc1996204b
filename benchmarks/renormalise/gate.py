"""A router that trains and is scored under any rule, by `leanmoe.routing.route` alone.

Shape suffixes: T tokens, E experts, D hidden width, K slots, B decode steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from leanmoe.models.routers import Router, Scoring
from leanmoe.plan import Rule
from leanmoe.routing import route
from reference_model.architecture import routers

EPSILON = 1e-20
"""DeepSeek-V3's, in the sum that divides the weights."""


@dataclass
class Routed:
    """How the gates of one model route; changed between passes."""

    router: Router
    top_k: int
    rule: Rule = field(default_factory=Rule)
    decode_batch: int = 1
    """Sequences whose tokens at one position make a step."""
    sequence: int = 1
    """Tokens of a sequence."""


class RuleGate(DeepseekV3TopkRouter):  # type: ignore[misc]
    """DeepSeek-V3's gate with another scoring function and a rule."""

    routed: Routed

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (T,E), weights (T,K) and ids (T,K); a skipped slot is expert 0 with weight 0."""
        how = self.routed
        hidden_TD = hidden_states.reshape(-1, hidden_states.shape[-1]).float()
        logits_TE = linear(hidden_TD, self.weight.float())
        steps_BTE = logits_TE
        if how.rule.is_batch_aware:
            shape = (-1, how.decode_batch, how.sequence, logits_TE.shape[-1])
            steps_BTE = logits_TE.view(shape).transpose(1, 2).flatten(0, 1)
        bias_E = self.e_score_correction_bias.detach()
        ids, weights, _ = route(steps_BTE, how.router, how.top_k, how.rule, bias_E)
        if how.rule.is_batch_aware:
            back = (-1, how.sequence, how.decode_batch, ids.shape[-1])
            ids, weights = (x.view(back).transpose(1, 2).flatten(0, 2) for x in (ids, weights))
        return logits_TE, weights, ids.masked_fill(ids == logits_TE.shape[-1], 0)


def install(model: Any, scoring: Scoring, sequence: int) -> Routed:
    """Makes the gates of a DeepSeek-V3 ones that score by `scoring`; what they route by."""
    config = model.config
    router = Router(scoring, "bias", True, EPSILON, config.routed_scaling_factor)
    routed = Routed(replace(router, sorted_top_k=False), config.num_experts_per_tok)
    routed.sequence = sequence
    for gate in routers(model):
        gate.__class__ = RuleGate
        object.__setattr__(gate, "routed", routed)
    return routed


def projections(model: Any, inputs_SN: Tensor, routed: Routed, left: int) -> list[float]:
    """By layer, the `renormalise` that brings the best `left` experts' output nearest to all's.

    With y the output of all and z that of the best, weights kept, the factor c = <y, z> / <z, z>
    is least squares'; normalising anew multiplies by 1/m, m the mean share of weight left; what
    comes out is ln c / ln(1/m).
    """
    found: list[float] = []

    def observe(experts: nn.Module, inputs: tuple[Tensor, Tensor, Tensor], all_TD: Tensor) -> None:
        hidden_TD, ids_TK, weights_TK = inputs
        order_TK = weights_TK.argsort(dim=-1, descending=True)
        is_left_TK = order_TK.argsort(dim=-1) < left
        some_TK = weights_TK * is_left_TK
        some_TD = experts.forward(hidden_TD, ids_TK, some_TK).double()
        factor = (all_TD.double() * some_TD).sum() / some_TD.square().sum()
        share = (some_TK.sum(-1) / weights_TK.sum(-1)).double().log().mean()
        found.append(float(factor.log() / -share))

    layers = [layer.mlp.experts for layer in model.model.layers if hasattr(layer.mlp, "gate")]
    handles = [experts.register_forward_hook(observe) for experts in layers]
    routed.rule = Rule()
    with torch.no_grad():
        model.model(input_ids=inputs_SN, use_cache=False)
    for handle in handles:
        handle.remove()
    return found
