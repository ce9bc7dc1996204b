"""What replies are worth: agreement, answers, repetition, length. Plain Python, no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from leanmoe.core.errors import LeanMoeError

NUMBER = r"-?\d[\d,]*(?:\.\d+)?"
"""The answer in a reply by default: GSM8K's, the last number."""
GRAM = 4
"""Tokens of the pieces whose repetition is counted."""


def first_divergence(first: Sequence[int], second: Sequence[int]) -> int | None:
    """The first position in which two replies differ; None where neither has one."""
    for place, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return place
    return None if len(first) == len(second) else min(len(first), len(second))


def until(reply: Sequence[int], ends: frozenset[int]) -> list[int]:
    """The reply up to its first end token, without it."""
    for place, token in enumerate(reply):
        if token in ends:
            return list(reply[:place])
    return list(reply)


def repeated_share(reply: Sequence[int], gram: int = GRAM) -> float:
    """Share of the reply's pieces of `gram` tokens that were there before; 0 for a short one."""
    pieces = [tuple(reply[n : n + gram]) for n in range(len(reply) - gram + 1)]
    return 1 - len(set(pieces)) / len(pieces) if pieces else 0.0


def pass_at(count: int, right: int, tries: int) -> float:
    """Chance that one of `tries` of a prompt's replies is right, of `count` with `right` right.

    The unbiased estimator of Chen et al. 2021 (arXiv 2107.03374, section 2.1):
    1 - C(count - right, tries) / C(count, tries).
    """
    if not 1 <= tries <= count or not 0 <= right <= count:
        raise LeanMoeError(f"pass@{tries} of {count} replies with {right} right does not exist")
    return 1 - math.comb(count - right, tries) / math.comb(count, tries)


def compiled(pattern: str) -> re.Pattern[str]:
    """The pattern of answers. Raises LeanMoeError for one that is no regular expression."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise LeanMoeError(f"pattern {pattern!r} is no regular expression: {error.msg}") from error


def answer_in(text: str, pattern: re.Pattern[str]) -> str | None:
    """The last answer in a text: the pattern's first group, or all of it. Commas do not count."""
    found = list(pattern.finditer(text))
    if not found:
        return None
    value = found[-1].group(1) if pattern.groups else found[-1].group()
    return (value or "").replace(",", "").strip()
