"""Batch-aware rules over the tokens of all data-parallel ranks: one small sum a layer.

Each rank routes its own tokens. All it must know of the others is their expert demand: how often
their tokens rank an expert best, how often they guarantee it, and its gate mass. These are three
whole numbers an expert, whatever the number of tokens. So a rank with few tokens or none takes part
as any other does, and all ranks decide alike, to the last bit.

This is for eager loops of one's own; vLLM's adapter sums the same demand with vLLM's own groups. It
is tested with gloo on CPUs and was never run on several GPUs.

Letters: B steps routed apart, E experts.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from leanmoe.core.errors import LeanMoeError
from leanmoe.kernels.triton.router import MOST_TOKENS_OF_ALL
from leanmoe.plan.placement import Placement
from leanmoe.routing import BatchScope


def scope_of_all_ranks(
    group: dist.ProcessGroup | None = None, placement: Placement | None = None
) -> BatchScope:
    """The batch scope of all ranks of `group`; None stands for the group of all processes.

    Every rank must route every step of every layer under the same rule, with no tokens where it has
    none: `tokens_of_all` decides which band applies. If a rank leaves a step out, the others wait
    for it until the group's timeout, and then fail.

    A layer costs one all-reduce of 3 x E int64 (3 KiB for 128 experts) before its experts can run.
    Its time is that of the latency, not of the bytes.
    """

    def exchange(demand_B3E: Tensor) -> Tensor:
        total_B3E = demand_B3E.clone()
        dist.all_reduce(total_B3E, group=group)
        return total_B3E

    return BatchScope(placement, exchange)


def tokens_of_all(
    tokens: int, device: torch.device | str = "cpu", group: dist.ProcessGroup | None = None
) -> int:
    """The number of tokens that all ranks have in a step; every rank asks once a step.

    Raises LeanMoeError, on every rank, for more tokens than a sum of expert demand can count.
    """
    total = torch.tensor(tokens, device=device)
    dist.all_reduce(total, group=group)
    if int(total) > MOST_TOKENS_OF_ALL:
        raise LeanMoeError(
            f"a step has {int(total)} tokens on all ranks: at most {MOST_TOKENS_OF_ALL} can share "
            "experts"
        )
    return int(total)
