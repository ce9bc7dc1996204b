"""Which copy of an expert a step reads where vLLM's load balancer (EPLB) holds several.

vLLM picks a copy by the row's position, so a step of many rows reads every copy of a popular
expert. While reading weights takes the time, that is time lost: all rows of a step read one copy
here, as long as an expert's rows are too few to fill a kernel's tile. Copies are equal, so are the
outputs. Every rank that computes the same rows picks the same copy, since the choice depends on
vLLM's own tables alone.

Letters: T tokens (rows of a step), E experts, K slots of a token, C copies of an expert at most.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor

from leanmoe.serve.vllm.layer_routing import step_rows

MOST_ROWS = 128
"""Rows up to which an expert's time is that of reading its weights."""
POPULARITY = 4
"""How many times its even share of a step's slots a popular expert is taken to get."""


class OneCopy:
    """Stands in the place of one router's `_apply_eplb_mapping`."""

    def __init__(self, router: Any) -> None:
        self._router, self._stock = router, router._apply_eplb_mapping

    @classmethod
    def put(cls, router: Any) -> None:
        """Lets vLLM call it from now on; a router without a load balancer keeps its own."""
        if getattr(router, "eplb_state", None) is not None:
            router._apply_eplb_mapping = cls(router)

    def __call__(self, topk_ids: Tensor) -> Tensor:
        """Physical ids (T,K) for logical ones; vLLM's mapping, which records the load as well."""
        state, rows = self._router.eplb_state, step_rows(topk_ids.shape[0])
        is_mapped = state is not None and state.logical_to_physical_map is not None
        experts = self._router.global_num_experts
        if not is_mapped or not reads_one_copy(rows, topk_ids.shape[1], experts):
            mapped: Tensor = self._stock(topk_ids)
            return mapped
        router = copy.copy(self._router)
        router.eplb_state = copy.copy(state)
        router.eplb_state.logical_to_physical_map = one_copy(
            state.logical_to_physical_map, state.logical_replica_count
        )
        return type(router)._apply_eplb_mapping(router, topk_ids)  # type: ignore[no-any-return]


def reads_one_copy(rows: int, slots: int, experts: int) -> bool:
    """Whether even a popular expert has so few rows in a step that one copy computes them."""
    return rows * slots * POPULARITY <= MOST_ROWS * experts


def one_copy(physical_EC: Tensor, copies_E: Tensor) -> Tensor:
    """vLLM's table of physical ids (E,C) with one copy of each expert in all of its columns.

    The copy is the first one's physical id modulo the number of copies: the first ones alone would
    leave the GPUs that hold few of them idle. It is computed anew at each step, since vLLM changes
    its table in place.
    """
    copies_E1 = copies_E.clamp(min=1).unsqueeze(1)
    choice_E1 = (physical_EC[:, :1] % copies_E1).long()
    return physical_EC.gather(1, choice_E1.expand_as(physical_EC))
