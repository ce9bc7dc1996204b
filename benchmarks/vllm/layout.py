"""How a model is spread over GPUs in a benchmark, and how its processes keep in step."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Ranks of tensor and data parallelism; with expert parallelism each GPU has whole experts."""

    tensor: int = 1
    data: int = 1
    is_expert: bool = False

    @classmethod
    def parse(cls, name: str) -> Layout:
        """As in "1", "tp2", "tp2-ep", "dp2-ep", "tp2-dp2-ep"; ValueError for anything else."""
        found = re.fullmatch(r"1|(?:tp(\d+))?-?(?:dp(\d+))?(-ep)?", name)
        if found is None or not name:
            raise ValueError(f"layout {name!r} must be 1, or like tp2, tp2-ep, dp2-ep, tp2-dp2-ep")
        return cls(int(found[1] or 1), int(found[2] or 1), found[3] is not None)

    @property
    def gpus(self) -> int:
        """One process each."""
        return self.tensor * self.data

    @property
    def expert_ranks(self) -> int:
        """GPUs that the experts are divided among, whole."""
        return self.gpus if self.is_expert else 1

    def settings(self) -> dict[str, Any]:
        """What vLLM's LLM is given; its processes are started by the benchmark."""
        if self.gpus == 1:
            return {}
        return {
            "tensor_parallel_size": self.tensor, "data_parallel_size": self.data,
            "enable_expert_parallel": self.is_expert,
            "distributed_executor_backend": "external_launcher",
        }  # fmt: skip


SINGLE = Layout()
"""One GPU."""


class Ranks:
    """The processes of a layout: they decide alike, since each waits for the others in a step."""

    def __init__(self, layout: Layout) -> None:
        """After the engine was loaded, which makes the group."""
        self._group: Any = None
        self.rank = 0
        if layout.gpus > 1:
            from vllm.distributed.parallel_state import get_world_group

            self._group, self.rank = get_world_group().cpu_group, get_world_group().rank
        self.data_rank = self.rank // layout.tensor

    def first_says(self, value: bool) -> bool:
        """What the first process says, everywhere."""
        found = torch.tensor([int(value) if self.rank == 0 else 0])
        return bool(self.most(found)[0])

    def slowest(self, seconds: float) -> float:
        """The most that any process took."""
        return float(self.most(torch.tensor([seconds], dtype=torch.float64))[0])

    def most(self, values: Tensor) -> Tensor:
        """The most of all processes, value by value; waits for all."""
        if self._group is not None:
            torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX, group=self._group)
        return values
