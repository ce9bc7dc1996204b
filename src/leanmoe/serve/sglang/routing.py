"""A rule as the custom routing function of one SGLang call.

Letters: T tokens (rows of a step), E experts, K slots of a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from leanmoe.core.errors import LeanMoeError
from leanmoe.kernels.dispatch import route_ids
from leanmoe.models.routers import Router
from leanmoe.plan import Rule
from leanmoe.serve.plugin_options import is_plain

SIGMOID_EPSILON = 1e-20


class BandRule(NamedTuple):
    """A layer's rule in steps of at most `up_to` real rows; None: in all that are left."""

    up_to: int | None
    rule: Rule


def planned_config(
    config: Any, rule: Rule, top_k: int, real_1: Tensor | None, skipped_id: int | None = None
) -> Any:
    """SGLang's config of a call with the rule in it.

    `real_1` is the number of rows that are tokens, on the device; None for all of them.
    `skipped_id` is the id of a skipped slot; None repeats the token's best expert.
    """
    if is_plain(rule):
        return replace(config, top_k=rule.top_k or config.top_k)
    return banded_config(config, [BandRule(None, rule)], top_k, real_1, skipped_id)


def banded_config(
    config: Any,
    bands: Sequence[BandRule],
    top_k: int,
    real_1: Tensor | None,
    skipped_id: int | None = None,
) -> Any:
    """SGLang's config of a call that routes by the first of `bands` which its real rows are in.

    A captured step has a size, and is replayed with fewer real rows: where a band ends between two
    captured sizes the step routes under both rules, and `real_1` chooses on the device.
    """
    router, bias_E = read_router(config), config.correction_bias
    widths = [top_k if band.rule.top_k is None else band.rule.top_k for band in bands]

    def custom(
        hidden_states: Tensor, gating_output: Tensor, topk: int, renormalize: bool
    ) -> tuple[Tensor, Tensor]:
        del hidden_states, topk, renormalize
        padding_T = None
        if real_1 is not None:
            rows_T = torch.arange(gating_output.shape[0], device=gating_output.device)
            padding_T = rows_T >= real_1
        routed = [
            _widened(
                *route_ids(
                    gating_output, router, top_k, band.rule, bias_E, padding_T,
                    skipped_id=skipped_id,
                ),
                max(widths), skipped_id,
            )
            for band in bands
        ]  # fmt: skip
        ids_TK, weights_TK = routed[-1]
        for band, (ids, weights) in zip(bands[-2::-1], routed[-2::-1], strict=True):
            is_in_band: Any = real_1 <= band.up_to  # type: ignore[operator]
            ids_TK = torch.where(is_in_band, ids, ids_TK)
            weights_TK = torch.where(is_in_band, weights, weights_TK)
        return weights_TK, ids_TK

    return replace(
        config, top_k=max(widths), use_grouped_topk=False, custom_routing_function=custom
    )


def _widened(
    ids_TK: Tensor, weights_TK: Tensor, slots: int, skipped_id: int | None
) -> tuple[Tensor, Tensor]:
    """Ids and weights with `slots` slots; those added are skipped."""
    missing = slots - ids_TK.shape[1]
    if missing <= 0:
        return ids_TK, weights_TK
    added = ids_TK[:, :1] if skipped_id is None else torch.full_like(ids_TK[:, :1], skipped_id)
    ids_TK = torch.cat((ids_TK, added.expand(-1, missing)), dim=1)
    return ids_TK, functional.pad(weights_TK, (0, missing))


def read_router(config: Any) -> Router:
    """How SGLang's own routing chooses.

    Scaling is left out: SGLang scales after a custom function, too. Raises LeanMoeError for a
    router that leanmoe cannot compute.
    """
    if config.custom_routing_function is not None:
        raise LeanMoeError("its routing is a function of its own: only top_k alone can run here")
    if config.scoring_func not in ("softmax", "sigmoid"):
        raise LeanMoeError(f"it scores by {config.scoring_func}: only top_k alone can run here")
    has_bias = config.correction_bias is not None
    # Grouped routing with a bias is DeepSeek-V3's, whatever scoring_func says.
    is_sigmoid = config.scoring_func == "sigmoid" or (config.use_grouped_topk and has_bias)
    normalise = bool(config.renormalize)
    return Router(
        scoring="sigmoid" if is_sigmoid else "softmax",
        ranking_bias="correction_bias" if has_bias else None,
        normalise=normalise,
        normalise_epsilon=SIGMOID_EPSILON if is_sigmoid and normalise else 0.0,
        groups=(config.num_expert_group or 1) if config.use_grouped_topk else 1,
        groups_used=(config.topk_group or 1) if config.use_grouped_topk else 1,
        group_score="top2_sum" if has_bias else "max",
    )
