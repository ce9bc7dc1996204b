"""Small steps whose tokens share experts, grouped by expert before vLLM's kernel sees them.

Where a step's slots are few, vLLM's Triton experts compute each by itself: an expert that three
tokens use is read three times. That costs the full model little, whose few tokens hardly meet, and
costs rules by which tokens share experts all that they gain. vLLM groups larger steps with its
`moe_align_block_size`; here it groups the small ones of such rules, too. One short launch more.

Nothing depends on it but time: a step that is not recognised here is computed slot by slot.
"""

from __future__ import annotations

import functools
from importlib import import_module
from typing import Any

from torch import Tensor

from leanmoe.serve.vllm.skipping import TRITON

MODULE, _ = TRITON
"""Where vLLM's Triton experts find the first of the two functions."""
ASSIGN, GROUP = "_prepare_expert_assignment", "moe_align_block_size"


class _Asked:
    """The ids that routing asked to have grouped last, by where they lie."""

    address = 0


def ask(ids_TK: Tensor) -> None:
    """Has the experts of the layer that gets these ids next group them."""
    _Asked.address = ids_TK.data_ptr()


def put() -> None:
    """Puts the grouping in the place of vLLM's choice; again, it changes nothing."""
    module = import_module(MODULE)
    stock = getattr(module, ASSIGN)
    if hasattr(stock, "__wrapped__"):
        return
    group = import_module(stock.__module__).__dict__[GROUP]

    @functools.wraps(stock)
    def assign(
        topk_ids: Tensor,
        config: dict[str, Any],
        num_tokens: int,
        top_k_num: int,
        global_num_experts: int,
        expert_map: Tensor | None,
        **others: Any,
    ) -> Any:
        asked, _Asked.address = _Asked.address, 0
        if topk_ids.data_ptr() == asked and expert_map is None:
            return group(topk_ids, config["BLOCK_SIZE_M"], global_num_experts, None)
        return stock(
            topk_ids, config, num_tokens, top_k_num, global_num_experts, expert_map, **others
        )

    setattr(module, ASSIGN, assign)


def why_not_group() -> str | None:
    """Why small steps cannot be grouped in this vLLM; None if they can."""
    module = import_module(MODULE)
    stock = getattr(module, ASSIGN, None)
    if stock is None or not hasattr(import_module(stock.__module__), GROUP):
        return f"this vLLM's Triton experts have no {ASSIGN} or {GROUP}"
    return None
