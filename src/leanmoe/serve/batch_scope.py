"""Tokens that share experts with those of other data-parallel ranks: one small sum a layer.

Each rank routes its own tokens. What it must know of the others' is how often they rank an expert
best, guarantee it and vote for it: three whole numbers an expert, whatever the number of tokens.
So a rank with few tokens or none takes part as any other, and all decide alike, to the last bit.

For loops of one's own, eager ones; vLLM's adapter sums the same ballots with vLLM's own groups.
Tested with gloo on CPUs, never run on several GPUs.
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
    """The company of the tokens of all ranks of `group` (None: of all processes).

    Every rank must route every step of every layer, with no tokens where it has none, under the
    same rule: which band applies is decided by `tokens_of_all`. A rank that stays away keeps the
    others waiting until the group's own timeout.

    A layer costs one all-reduce of 3 x E int64 (3 KiB for 128 experts) on the way to its experts,
    and is waited for: bound by latency, not by bytes.
    """

    def exchange(demand_B3E: Tensor) -> Tensor:
        total_S3E = demand_B3E.clone()
        dist.all_reduce(total_S3E, group=group)
        return total_S3E

    return BatchScope(placement, exchange)


def tokens_of_all(
    tokens: int, device: torch.device | str = "cpu", group: dist.ProcessGroup | None = None
) -> int:
    """The tokens of a step on all ranks together: the same number everywhere, once a step.

    Raises LeanMoeError, on every rank, for more than ranks can tell each other of.
    """
    total = torch.tensor(tokens, device=device)
    dist.all_reduce(total, group=group)
    if int(total) > MOST_TOKENS_OF_ALL:
        raise LeanMoeError(
            f"a step has {int(total)} tokens on all ranks: at most {MOST_TOKENS_OF_ALL} can share "
            "experts"
        )
    return int(total)
