"""How the GPU experts are cut into tiles: one small record for each shape and number of tokens."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from leanmoe.core.errors import LeanMoeError

MOST_DIRECT_TOKENS = 32
"""Above, looking through all ids in every program costs more than a work list."""


@dataclass(frozen=True)
class Tile:
    """How one of the two products is tiled."""

    columns: int = 64
    """Columns of the result a program computes; the first product reads twice as many rows of
    gated weights for them."""
    depth: int = 64
    """Columns of the operands read in one step."""
    warps: int = 4
    stages: int = 4
    group: int = 1
    """Blocks of rows that run side by side at each tile of columns."""
    weights_left: bool = True
    """Whether the weights are the left operand: the matrix unit's wide side, where rows are few."""
    described: bool = False
    """Whether the copy engine reads the weights, told by a descriptor, and not the threads. Needs
    compute capability 9 and weights that lie in rows; others are read by the threads."""


@dataclass(frozen=True)
class ExpertsConfig:
    """How the experts of one layer run for one number of tokens."""

    rows: int = 16
    """Token rows of a block's piece; with `is_direct`, at least the number of tokens."""
    tail: int = 0
    """Rows more that a block's last piece may have at the same tile of weights; half of them where
    that does."""
    is_direct: bool = False
    """No work list: each program looks its expert's tokens up in the ids."""
    gate_up: Tile = Tile()
    down: Tile = Tile()
    overlap: bool = True
    """Whether a program starts while the one before is ending, and waits for it inside."""
    is_joined: bool = False
    """The second product's programs each add up a token's slots, without the matrix unit; for one
    token or a few, and only where `is_direct`. Of `down`, columns, depth and warps count."""
    parts: int = 1
    """With fp8 weights: how many fp8 numbers an activation is the sum of, 1 or 2. Two are as exact
    as bf16 and twice the work of the matrix unit, which costs nothing where memory decides. With
    the weights on the left, and without a tail."""
    pieces: int = 1
    """So many times `rows` are a block of the work list, and its tail: an expert with more rows
    than two pieces has full ones, and no more than one tail. Not with fp8 weights, for which
    nobody ran it on a GPU."""
    float16_act: bool = False
    """With fp8 weights: whether what lies between the products stays float16, on the scale that fp8
    would have, and the second product makes its weights float16 on their way into the matrix unit,
    which changes none of them. For many rows: two parts would be twice as many."""

    def __post_init__(self) -> None:
        are_left = self.gate_up.weights_left and (self.is_joined or self.down.weights_left)
        if self.parts not in (1, 2) or (self.parts == 2 and (self.tail or not are_left)):
            raise LeanMoeError(
                f"experts config has parts {self.parts}: it must be 1, or 2 without a tail and "
                "with the weights on the left"
            )
        if self.pieces < 1 or (self.pieces > 1 and (self.is_direct or self.parts == 2)):
            raise LeanMoeError(
                f"experts config has pieces {self.pieces}: it must be 1 or more, and 1 where "
                "is_direct is true or parts is 2"
            )
        if self.float16_act and (self.parts == 2 or self.is_direct):
            raise LeanMoeError(
                "experts config has float16_act true: it must be false where is_direct is true or "
                "parts is 2"
            )

    @property
    def block_rows(self) -> int:
        """Rows in a full block of the work list."""
        return self.rows * self.pieces + self.tail

    def to_json(self) -> dict[str, Any]:
        """Every field."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Any, where: str) -> ExpertsConfig:
        """Reads what `to_json` wrote; anything else is a LeanMoeError naming the place.

        What was written before there were pieces and float16 between products has none.
        """
        before = {"pieces": 1, "float16_act": False}
        found = _record(cls, {**before, **value} if isinstance(value, dict) else value, where)
        for name in ("gate_up", "down"):
            found[name] = Tile(**_record(Tile, found[name], f"{where}.{name}"))
        try:
            config = cls(**found)
        except LeanMoeError as error:
            raise LeanMoeError(f"{where}: {error}") from error
        for name, number in (("rows", config.rows), ("tail", config.tail)):
            if number < 0 or number & (number - 1) or (name == "rows" and number < 16):
                raise LeanMoeError(f"{where}.{name} is {number}: it must be a power of two")
        if config.is_joined and not config.is_direct:
            raise LeanMoeError(f"{where}.is_joined is true: is_direct must then be true, too")
        for name, tile in (("gate_up", config.gate_up), ("down", config.down)):
            _check_tile(tile, f"{where}.{name}")
        return config


def _check_tile(tile: Tile, where: str) -> None:
    for size in ("columns", "depth", "warps"):
        number = getattr(tile, size)
        if number < 1 or number & (number - 1):
            raise LeanMoeError(f"{where}.{size} is {number}: it must be a power of two")
    for count in ("stages", "group"):
        if getattr(tile, count) < 1:
            raise LeanMoeError(f"{where}.{count} is {getattr(tile, count)}: it must be 1 or more")


def _record(kind: type, value: Any, where: str) -> dict[str, Any]:
    """The fields of a dataclass, all of them and no other, each of its own type."""
    names = {f.name: f.type for f in fields(kind)}
    if not isinstance(value, dict) or set(value) != set(names):
        raise LeanMoeError(f"{where} is {value!r}: it must have the fields {', '.join(names)}")
    for name, type_name in names.items():
        wanted = {"int": int, "bool": bool}.get(str(type_name), dict)
        if type(value[name]) is not wanted:
            raise LeanMoeError(f"{where}.{name} is {value[name]!r}: it must be {type_name}")
    return dict(value)
