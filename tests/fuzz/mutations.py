"""Files as somebody else might have written them: seeds with values, keys and bytes changed."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from hypothesis import strategies as st

Draw = Any
"""Hypothesis's `draw`."""
MOST_CHANGES = 3
DEEP = 2000
"""Lists inside each other: more than Python's parser follows."""
NUMBERS: tuple[Any, ...] = (
    0, -1, 1, 2, 3, 7, 64, 4097, 2**31, 10**9, 10**18, 10**400, -(10**18), 0.5, -0.5, 1e-300, 1e308,
    float("nan"), float("inf"), float("-inf"),
)  # fmt: skip
WORDS: tuple[Any, ...] = (
    "", " ", "auto", "none", "null", "1", "-1", "1e999", "nan", "[bold]", "[/]", "%s", "a\nb",
    "\u2028", "\ud800", "\0", "../x", "re:(", "*", "x" * 5000, "full_attention", "linear_attention",
    "moe", "mixtral", "gpt_oss", "fp8", "bfloat16",
)  # fmt: skip
OTHERS: tuple[Any, ...] = (
    None, True, False, [], {}, [0], [1, 2], [None], [[]], ["a"], [0.5] * 3, [8] * 64, {"a": 1},
    [{"a": []}], [10**9, -1], ["full_attention"] * 7,
)  # fmt: skip
VALUES = (*NUMBERS, *WORDS, *OTHERS)
PARTS = ("text_config", "llm_config", "thinker_config", "quantization_config", "model", "data")
Path = tuple[str | int, ...]


@dataclass(frozen=True)
class Seeds:
    """The inputs of one kind as they should be: JSON values or, where `is_text`, words."""

    values: tuple[Any, ...]
    is_text: bool = False
    is_lines: bool = False
    """Whether a value is a list whose items stand on a line each."""

    @cached_property
    def places(self) -> tuple[tuple[Path, ...], ...]:
        """Where each seed can be changed; of a list the first two items and the last."""
        return tuple(tuple(_places(value, ())) for value in self.values)

    @cached_property
    def items(self) -> tuple[tuple[str, Any], ...]:
        """Every key of every seed with a value that it has somewhere."""
        pairs = [pair for value in self.values for pair in _items(value)]
        return tuple({(key, repr(value)): (key, value) for key, value in pairs}.values())


def _places(value: Any, path: Path) -> list[Path]:
    found = [path]
    if isinstance(value, Mapping):
        for key, each in value.items():
            found += _places(each, (*path, key))
    elif isinstance(value, list):
        for index in sorted({0, 1, len(value) - 1} & set(range(len(value)))):
            found += _places(value[index], (*path, index))
    return found


def _items(value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, Mapping):
        inner = [pair for each in value.values() for pair in _items(each)]
        return [*value.items(), *inner]
    return [pair for each in value for pair in _items(each)] if isinstance(value, list) else []


@st.composite
def damaged(draw: Draw, seeds: Seeds) -> bytes:
    """One of the seeds, or what is left of it after some changes, as a file holds it."""
    number = draw(st.integers(0, len(seeds.values) - 1))
    value = seeds.values[number]
    count = draw(st.integers(0, MOST_CHANGES))
    if seeds.is_text:
        for _ in range(count):
            value = _changed_text(draw, value)
        return _bytes(draw, value)
    for _ in range(count):
        path = draw(st.sampled_from(seeds.places[number]))
        value = _changed(draw, value, path, seeds)
    if seeds.is_lines and isinstance(value, list):
        return _bytes(draw, "\n".join(json.dumps(each) for each in value))
    return _bytes(draw, json.dumps(value))


def _changed(draw: Draw, value: Any, path: Path, seeds: Seeds) -> Any:
    """The value with another one at `path`, without it, or with one more beside it."""
    how = draw(st.sampled_from(("value", "value", "value", "gone", "item", "near", "listed", "in")))
    if how == "gone":
        return _without(value, path)
    if how == "item":
        key, other = draw(st.sampled_from(seeds.items)) if seeds.items else ("a", 1)
        other = draw(st.sampled_from((other, *VALUES)))
        return _at(value, path, lambda old: {**old, key: other} if isinstance(old, dict) else other)
    if how == "near":
        change = draw(st.sampled_from((1, -1, 2)))
        return _at(value, path, lambda old: _near(old, change))
    if how == "listed":
        length = draw(st.sampled_from((1, 2, 30, 64)))
        return _at(value, path, lambda old: [old] * length)
    if how == "in":
        part = draw(st.sampled_from(PARTS))
        return _at(value, path, lambda old: {part: old})
    other = draw(st.sampled_from(VALUES))
    return _at(value, path, lambda _old: other)


def _at(value: Any, path: Path, change: Any) -> Any:
    """The value with what stands at `path` changed; as it was where nothing stands there."""
    if not path:
        return change(value)
    key, rest = path[0], path[1:]
    if isinstance(value, dict) and key in value:
        return {**value, key: _at(value[key], rest, change)}
    if isinstance(value, list) and isinstance(key, int) and key < len(value):
        return [*value[:key], _at(value[key], rest, change), *value[key + 1 :]]
    return value


def _without(value: Any, path: Path) -> Any:
    if not path:
        return None
    *parent, last = path

    def left(old: Any) -> Any:
        if isinstance(old, dict):
            return {key: each for key, each in old.items() if key != last}
        if isinstance(old, list) and isinstance(last, int):
            return [*old[:last], *old[last + 1 :]]
        return old

    return _at(value, tuple(parent), left)


def _near(old: Any, change: int) -> Any:
    """A number one off, doubled or of another type; a text in a letter's place."""
    if isinstance(old, bool) or old is None:
        return not old
    if isinstance(old, int | float):
        return {1: old + 1, -1: float(old) if abs(old) < 1e300 else -old, 2: old * 2}[change]
    if isinstance(old, str):
        return {1: f"{old}x", -1: old[:-1], 2: [old, old]}[change]
    if isinstance(old, list):
        return {1: [*old, *old[:1]], -1: old[:-1], 2: old * 2}[change]
    return list(old)


def _changed_text(draw: Draw, text: str) -> str:
    """The text with a word or a line changed, doubled or gone."""
    parts = re.split(r"(\s|[{}=:,\"#]+)", text)
    place = draw(st.integers(0, len(parts) - 1))
    how = draw(st.sampled_from(("word", "word", "gone", "twice", "cut")))
    if how == "cut":
        return "".join(parts[:place])
    middle = {"gone": [], "twice": [parts[place]] * 2}.get(how)
    if middle is None:
        middle = [_words(draw(st.sampled_from(VALUES)))]
    return "".join([*parts[:place], *middle, *parts[place + 1 :]])


def _words(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _bytes(draw: Draw, text: str) -> bytes:
    """UTF-8, and now and then what is none, or no whole file, or too deep."""
    content = text.encode("utf-8", "surrogatepass")
    how = draw(st.integers(0, 63))
    if how == 1:
        return content[: len(content) // 2]
    if how == 2:
        return b"\xef\xbb\xbf" + content
    if how == 3:
        return b"\xff\xfe" + text.encode("utf-16-le", "surrogatepass")
    if how == 4:
        return content + content
    if how == 5:
        return b"[" * DEEP + content + b"]" * DEEP
    if how == 6:
        return content.replace(b"{", b'{"model_type": 1, "model_type": [], ', 1)
    return b"" if how == 7 else content


def sequence_of(values: Sequence[Any]) -> Seeds:
    """Seeds of JSON values."""
    return Seeds(tuple(json.loads(json.dumps(value)) for value in values))
