"""Which rank computes each expert, where experts are spread over several GPUs.

Needs no torch. Ids are logical: a checkpoint's own, before an engine copies experts or moves them
about to balance its load. A plan holds no placement: whoever runs it knows where the experts are.
"""

from __future__ import annotations

from dataclasses import dataclass

from leanmoe.core.errors import LeanMoeError


@dataclass(frozen=True)
class Placement:
    """One rank for each expert; several copies of an expert cannot be said."""

    rank_of: tuple[int, ...]
    """By expert."""
    ranks: int

    def __post_init__(self) -> None:
        _check_ranks(self.ranks, len(self.rank_of))
        for expert, rank in enumerate(self.rank_of):
            if not 0 <= rank < self.ranks:
                raise LeanMoeError(
                    f"expert {expert} is placed on rank {rank}: it must be 0 to {self.ranks - 1}"
                )

    @classmethod
    def linear(cls, experts: int, ranks: int) -> Placement:
        """Blocks of neighbouring experts; the first ranks have one more where it does not divide.

        vLLM's default, and SGLang's.
        """
        _check_ranks(ranks, experts)
        each, more = divmod(experts, ranks)
        counts = [each + (rank < more) for rank in range(ranks)]
        return cls(tuple(r for r, count in enumerate(counts) for _ in range(count)), ranks)

    @classmethod
    def round_robin(cls, experts: int, ranks: int) -> Placement:
        """Expert e on rank e mod `ranks`: vLLM's other strategy."""
        _check_ranks(ranks, experts)
        return cls(tuple(expert % ranks for expert in range(experts)), ranks)

    @property
    def experts(self) -> int:
        """How many experts there are on all ranks."""
        return len(self.rank_of)

    def experts_on(self, rank: int) -> tuple[int, ...]:
        """The experts of one rank, lowest id first."""
        return tuple(expert for expert, found in enumerate(self.rank_of) if found == rank)

    def check(self, experts: int) -> None:
        """Raises LeanMoeError unless it places as many experts as the model has."""
        if self.experts != experts:
            raise LeanMoeError(
                f"the placement is of {self.experts} experts: the model has {experts}"
            )


def _check_ranks(ranks: int, experts: int) -> None:
    if not 1 <= ranks <= experts:
        raise LeanMoeError(f"ranks is {ranks}: it must be 1 to {experts}, the number of experts")
