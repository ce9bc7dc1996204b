"""How the GPU experts are cut into tiles: one small record for each shape and number of tokens."""

from __future__ import annotations

from dataclasses import dataclass

from leanmoe.core.errors import LeanMoeError

MOST_DIRECT_TOKENS = 32
"""Above, looking through all ids in every program costs more than grouping them once."""


def _check_power(name: str, number: int, least: int) -> None:
    if number < least or number & (number - 1):
        raise LeanMoeError(
            f"experts config has {name} {number}: it must be a power of two, {least} at least"
        )


@dataclass(frozen=True)
class Tile:
    """How one of the two products is tiled."""

    BLOCK_N: int = 64
    """Columns of the result a program computes; the first product reads twice as many rows of
    gated weights for them."""
    BLOCK_K: int = 64
    """Columns of the operands read in one step."""
    num_warps: int = 4
    num_stages: int = 4
    GROUP_M: int = 1
    """Blocks of rows that run side by side at each tile of columns."""
    swap_ab: bool = True
    """Whether the weights are the left operand: the matrix unit's wide side, where rows are few."""
    use_tma: bool = False
    """Whether the copy engine reads the weights, told by a descriptor, and not the threads. Needs
    compute capability 9 and weights that lie in rows; others are read by the threads."""

    def __post_init__(self) -> None:
        for name in ("BLOCK_N", "BLOCK_K", "num_warps"):
            _check_power(name, getattr(self, name), 1)
        for name in ("num_stages", "GROUP_M"):
            if getattr(self, name) < 1:
                raise LeanMoeError(
                    f"experts config has {name} {getattr(self, name)}: it must be 1 or more"
                )


@dataclass(frozen=True)
class ExpertsConfig:
    """How the experts of one layer run for one number of tokens."""

    BLOCK_M: int = 16
    """Token rows of a subblock; with `is_direct`, at least the number of tokens."""
    TAIL_M: int = 0
    """Rows more that a block's last subblock may have at the same tile of weights; half of them
    where that does."""
    is_direct: bool = False
    """Whether each program looks its expert's tokens up in the ids; else ids are grouped first."""
    gate_up: Tile = Tile()
    down: Tile = Tile()
    use_pdl: bool = True
    """Whether a program starts while the one before is ending, and waits for it inside
    (programmatic dependent launch)."""
    fused_sum: bool = False
    """Whether the second product's programs each add up a token's slots, without the matrix unit;
    for one token or a few, and only where `is_direct`. Of `down`, BLOCK_N, BLOCK_K and num_warps
    count."""
    fp8_terms: int = 1
    """With fp8 weights: how many fp8 numbers an activation is the sum of, 1 or 2. Two are as exact
    as bf16 and twice the work of the matrix unit, which costs nothing where memory decides. Needs
    `swap_ab`, and no tail."""
    subblocks: int = 1
    """A block has so many times BLOCK_M rows, and its tail: an expert with more rows than two
    subblocks has full ones, and no more than one tail. Not with fp8 weights, for which nobody ran
    it on a GPU."""
    float16_act: bool = False
    """With fp8 weights: whether what lies between the products stays float16, on the scale that fp8
    would have, and the second product makes its weights float16 on their way into the matrix unit,
    which changes none of them. For many rows, of which two terms would make twice as many."""

    def __post_init__(self) -> None:
        _check_power("BLOCK_M", self.BLOCK_M, 16)
        _check_power("TAIL_M", self.TAIL_M, 0)
        if self.fused_sum and not self.is_direct:
            raise LeanMoeError("experts config has fused_sum true: is_direct must be true, too")
        swaps = self.gate_up.swap_ab and (self.fused_sum or self.down.swap_ab)
        if self.fp8_terms not in (1, 2) or (self.fp8_terms == 2 and (self.TAIL_M or not swaps)):
            raise LeanMoeError(
                f"experts config has fp8_terms {self.fp8_terms}: it must be 1, or 2 with TAIL_M 0 "
                "and swap_ab true"
            )
        if self.subblocks < 1 or (self.subblocks > 1 and (self.is_direct or self.fp8_terms == 2)):
            raise LeanMoeError(
                f"experts config has subblocks {self.subblocks}: it must be 1 or more, and 1 where "
                "is_direct is true or fp8_terms is 2"
            )
        if self.float16_act and (self.fp8_terms == 2 or self.is_direct):
            raise LeanMoeError(
                "experts config has float16_act true: it must be false where is_direct is true or "
                "fp8_terms is 2"
            )

    @property
    def block_rows(self) -> int:
        """Rows in a full block."""
        return self.BLOCK_M * self.subblocks + self.TAIL_M
