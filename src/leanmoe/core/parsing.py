"""How the words of a command line are read: numbers, ranges and shares; one reader of each.

Every function raises LeanMoeError that names the option, what was given, and what is allowed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

from leanmoe.core.errors import LeanMoeError

Number = TypeVar("Number", int, float)


def require(holds: bool, name: str, value: object, allowed: str) -> None:
    """Raises LeanMoeError unless it holds: "--repeats is 2: it must be at least 3"."""
    if not holds:
        raise LeanMoeError(f"{name} is {value}: it must be {allowed}")


def flag(name: str) -> str:
    """A setting as the command line spells it: "input_len" is "--input-len"."""
    return "--" + name.replace("_", "-")


def parse_numbers(name: str, text: str, kind: Callable[[str], Number]) -> tuple[Number, ...]:
    """Reads "1,8,32" as numbers of that kind, all finite."""
    try:
        numbers = tuple(kind(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or not all(math.isfinite(number) for number in numbers):
        raise LeanMoeError(f"{name} is {text!r}: it must be numbers like 1,8,32")
    return numbers


def parse_counts(name: str, text: str) -> tuple[int, ...]:
    """Reads "1,8,32" as whole numbers of 1 or more."""
    numbers = parse_numbers(name, text, int)
    if min(numbers) < 1:
        raise LeanMoeError(
            f"{name} is {text!r}: it holds {min(numbers)}, and each must be 1 or more"
        )
    return numbers


def parse_range(name: str, text: str, least: int, most: int) -> tuple[int, int]:
    """Reads "1024" or "512:2048" as the lowest and the highest number of tokens."""
    try:
        numbers = [int(part) for part in text.split(":")]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2) or not least <= numbers[0] <= numbers[-1] <= most:
        raise LeanMoeError(
            f"{name} is {text!r}: it must be a number of tokens like 1024 or a range like "
            f"512:2048, from {least} to {most:,}"
        )
    return numbers[0], numbers[-1]


def parse_share(name: str, text: str, in_points: bool = False) -> float:
    """Reads "0.5%" as 0.005; a bare number is a share, or percentage points."""
    try:
        share = float(text.removesuffix("%"))
    except ValueError as error:
        example = "percentage points like 1" if in_points else "a share like 0.5% or 0.005"
        raise LeanMoeError(f"{name} is {text!r}: it must be {example}") from error
    return share / 100 if text.endswith("%") or in_points else share
