"""Which rows of a step are padding: no token's, put there to fill a captured graph.

Letters: T rows.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional

from leanmoe.core.errors import LeanMoeError

_KEY = "leanmoe_padding"


def padding_rows(rows: int, sequence_parallel: tuple[int, int] | None = None) -> Tensor | None:
    """True [T] for the running step's padding rows; None where vLLM says nothing of padding.

    Newer versions say it themselves. Before, a row without a place in the KV cache is none: the
    mask is computed once a step, and kept as long as the step's context, so that what a graph
    captured reads what the same graph wrote.

    `sequence_parallel` is (rank, ranks) where each rank has a share of the step's rows.
    """
    from vllm.forward_context import get_forward_context, is_forward_context_available

    if not is_forward_context_available():
        return None
    context = get_forward_context()
    mask_T = context.is_padding if hasattr(context, "is_padding") else _without_a_slot(context)
    if mask_T is None:
        return None
    if sequence_parallel is not None:
        mask_T = share(mask_T, *sequence_parallel)
    if mask_T.shape[0] < rows:
        raise LeanMoeError(
            f"a MoE layer computes {rows} rows, but vLLM marks padding among {mask_T.shape[0]}: "
            "rules that share experts cannot run with tokens gathered before routing; set "
            "data_parallel_size to 1 or another all2all_backend"
        )
    return mask_T[:rows]


def share(mask_T: Tensor, rank: int, ranks: int) -> Tensor:
    """This rank's rows where they are divided evenly, rows added for that being padding."""
    padded_T = functional.pad(mask_T, (0, -mask_T.shape[0] % ranks), value=True)
    size = padded_T.shape[0] // ranks
    return padded_T[rank * size : (rank + 1) * size]


def _without_a_slot(context: Any) -> Tensor | None:
    if _KEY not in context.additional_kwargs:
        slots = context.slot_mapping
        first = next(iter(slots.values()), None) if isinstance(slots, dict) else None
        context.additional_kwargs[_KEY] = None if first is None else first < 0
    found: Tensor | None = context.additional_kwargs[_KEY]
    return found
