"""Frozen dataclasses to JSON and back: unknown, missing and mistyped fields are refused by name.

A field without a default is always written and must be there. A field with one is optional: it is
left out where it equals its default. `stored_as` gives a field another name in the file.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import MISSING, Field, asdict, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import (
    Any,
    ClassVar,
    Literal,
    Self,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from leanmoe.core.errors import LeanMoeError, shown
from leanmoe.core.files import read_json, write_json

T = TypeVar("T")


class StoredFile:
    """Base of the dataclasses that are a whole file with a schema version."""

    KIND: ClassVar[str]
    """The key under which the file holds its schema version; it also tells files apart."""
    VERSION: ClassVar[int] = 1
    WHAT: ClassVar[str]
    """What messages call the file."""

    def to_json(self) -> dict[str, Any]:
        """The file's content: the schema version, then the fields."""
        return {self.KIND: self.VERSION, **fields_to_json(self)}

    @classmethod
    def from_json(cls, value: Any, name: str = "") -> Self:
        """Reads what `to_json` wrote.

        Raises LeanMoeError for another schema version and for unknown, missing or mistyped fields.
        """
        where = f"{cls.WHAT} {name}".strip()
        content = dict(_typed(dict, value, where))
        version = content.pop(cls.KIND, None)
        if version != cls.VERSION:
            raise LeanMoeError(
                f"{where} has schema version {shown(version)}: this leanmoe reads {cls.VERSION}"
            )
        return fields_from_json(cls, content, where, ": " if name else ".")

    @classmethod
    def of(cls, **fields: Any) -> Self:
        """The results with these fields, given as the JSON values that the file would hold."""
        return cls.from_json({cls.KIND: cls.VERSION, **fields})

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Reads a file; raises LeanMoeError as `from_json` does."""
        return cls.from_json(read_json(Path(path), cls.WHAT), str(path))

    def save(self, path: Path | str) -> None:
        """Writes the file, whole or not at all."""
        write_json(Path(path), self.to_json())


def stored_as(key: str) -> dict[str, str]:
    """The metadata of a dataclass field that files call `key`."""
    return {"key": key}


ALWAYS_STORED: Mapping[str, bool] = {"always": True}
"""The metadata of a dataclass field that is written where it equals its default, too."""


def to_json(value: Any) -> Any:
    """A dataclass, tuple or mapping as JSON values; a class's own `to_json` is used."""
    if is_dataclass(value):
        own = getattr(value, "to_json", None)
        return fields_to_json(value) if own is None else own()
    if isinstance(value, tuple | list):
        return [to_json(each) for each in value]
    if isinstance(value, Mapping):
        return {key: to_json(each) for key, each in value.items()}
    return value


def from_json(kind: type[T], value: Any, where: str) -> T:
    """Reads what `to_json` wrote of a `kind`; `where` names the place in messages.

    A class's own `from_json` is used. Raises LeanMoeError for unknown, missing and mistyped fields.
    """
    read: T = _read(kind, value, where)
    return read


def all_fields(value: Any) -> dict[str, Any]:
    """Every field of a dataclass as JSON values, defaults too."""
    written: dict[str, Any] = json.loads(json.dumps(asdict(value)))
    return written


def fields_to_json(value: Any) -> dict[str, Any]:
    """A dataclass's fields by their keys, without those that equal their defaults."""
    written = {}
    for each in fields(value):
        content = getattr(value, each.name)
        is_written = _is_required(each) or each.metadata.get("always", False)
        if is_written or content != _default(each):
            written[_key(each)] = to_json(content)
    return written


def fields_from_json(kind: type[T], value: Any, where: str, joint: str = ".") -> T:
    """Reads what `fields_to_json` wrote; a field's place is `where`, `joint` and its key."""
    content = _typed(dict, value, where)
    by_key = {_key(each): each for each in fields(kind)}  # type: ignore[arg-type]
    for key in content:
        if key not in by_key:
            allowed = ", ".join(by_key)
            raise LeanMoeError(f"{where} has an unknown field {shown(key)}: allowed are {allowed}")
    hints = _hints(kind)  # type: ignore[arg-type]
    given = {}
    for key, each in by_key.items():
        if key in content:
            given[each.name] = _read(hints[each.name], content[key], f"{where}{joint}{key}")
        elif _is_required(each):
            raise LeanMoeError(f"{where}{joint}{key} is missing")
    try:
        return kind(**given)
    except LeanMoeError as error:
        raise LeanMoeError(f"{where}: {error}") from error


def _read(kind: Any, value: Any, where: str) -> Any:
    if kind is Any:
        return value
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        if value is None and NoneType in arguments:
            return None
        return _read(next(each for each in arguments if each is not NoneType), value, where)
    if origin is tuple:
        items = _typed(list, value, where)
        return tuple(_read(arguments[0], each, f"{where}[{n}]") for n, each in enumerate(items))
    if origin in (dict, Mapping):
        content = _typed(dict, value, where)
        return {key: _read(arguments[1], each, f"{where}.{key}") for key, each in content.items()}
    if origin is Literal:
        return _typed(str, value, where)
    if hasattr(kind, "from_json"):
        return kind.from_json(value, where)
    if isinstance(kind, type) and is_dataclass(kind):
        return fields_from_json(kind, value, where)
    return _typed(kind, value, where)


_WORDS = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    list: "a list",
    dict: "an object",
}


def _typed(kind: Any, value: Any, where: str) -> Any:
    allowed = (int, float) if kind is float else (kind,)
    if not isinstance(value, allowed) or (isinstance(value, bool) and kind is not bool):
        raise LeanMoeError(f"{where} is {shown(value)}: it must be {_WORDS[kind]}")
    if kind in (int, float) and not abs(value) <= sys.float_info.max:
        raise LeanMoeError(f"{where} is {shown(value)}: it must be a finite number")
    return value


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _key(each: Field[Any]) -> str:
    return str(each.metadata.get("key", each.name))


def _is_required(each: Field[Any]) -> bool:
    return each.default is MISSING and each.default_factory is MISSING


def _default(each: Field[Any]) -> Any:
    return each.default if each.default_factory is MISSING else each.default_factory()
