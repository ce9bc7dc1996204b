"""How many rows of a step are real: SGLang's own count, told where it would not count.

SGLang fills up captured steps with padding rows, decode and prefill. On one GPU, and under tensor
parallelism alone, it does not say how many rows are real (`enable_num_token_non_padded`, 0.5.23):
then padding would take part in rules that share experts. That function is asked wherever SGLang
makes buffers, captures and replays; where it says True SGLang keeps the count on the device, and
writes -1 into padding rows.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module

from leanmoe.core.errors import LeanMoeError
from leanmoe.plan import Plan

HOME = "sglang.srt.model_executor.forward_batch_info"
NAME = "enable_num_token_non_padded"


def needs_count(plan: Plan) -> bool:
    """Whether a plan routes by how many rows are real: rules that share experts, and bands."""
    return is_batch_aware(plan) or any(band.up_to is not None for band in plan.bands)


def is_batch_aware(plan: Plan) -> bool:
    """Whether a token's experts depend on other tokens under any of the plan's rules."""
    return any(rule.is_batch_aware for band in plan.bands for rule in band.rules)


def always_counts() -> bool:
    """What stands in the place of SGLang's function."""
    return True


def make_count() -> Callable[[], bool]:
    """Has SGLang count real rows from now on; returns the function that it asked until now.

    Raises LeanMoeError for an SGLang without that function. To be called before a model runner is
    built, since its buffers are made by what the function says.
    """
    home = import_module(HOME)
    if not hasattr(home, NAME):
        raise LeanMoeError(
            f"this SGLang has no {HOME}.{NAME}, which tells padding rows from tokens: install the "
            "version that leanmoe was written for"
        )
    stock: Callable[[], bool] = getattr(home, NAME)
    for module in list(sys.modules.values()):
        if getattr(module, "__dict__", {}).get(NAME) is stock:
            setattr(module, NAME, always_counts)
    return stock


def check_counts() -> None:
    """Raises LeanMoeError if a module of SGLang's still asks a function of its own."""
    for name, module in list(sys.modules.items()):
        if not name.startswith("sglang."):
            continue
        asked = getattr(module, "__dict__", {}).get(NAME, always_counts)
        if asked is not always_counts:
            raise LeanMoeError(
                f"{name} asks another {NAME} than leanmoe's: its padding rows would count as "
                "tokens; unset LEANMOE_PLAN, or drop rules that share experts, and bands"
            )


def not_counted_reason() -> str | None:
    """Why no count is right for the rows that a MoE layer gets here; None where one is."""
    from sglang.srt.layers.moe.utils import is_moe_input_scattered_across_dp_ranks
    from sglang.srt.runtime_context import get_parallel

    parallel = get_parallel()
    if parallel.attn_cp_size > 1:
        return "context parallelism reorders a prompt's rows: set --attn-cp-size 1"
    if parallel.attn_dp_size > 1 and not is_moe_input_scattered_across_dp_ranks():
        return (
            "a MoE layer gets the padded rows of all data-parallel ranks: unset "
            "--enable-dp-attention"
        )
    return None
