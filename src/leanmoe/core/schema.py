"""Frozen dataclasses to JSON and back: unknown, missing and mistyped fields are refused by name.

A field without a default is always written and must be there. A field with one is optional: it is
left out where it equals its default. `stored_as` gives a field another name in the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
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

from leanmoe.core.errors import LeanMoeError
from leanmoe.core.files import read_json, write_json

T = TypeVar("T")


class ResultsFile:
    """Base of the dataclasses that are a whole results file with a schema version."""

    KIND: ClassVar[str]
    """The key under which the file holds its schema version; it also tells files apart."""
    VERSION: ClassVar[int] = 1
    WHAT: ClassVar[str]
    """What messages call the file."""

    def to_json(self) -> dict[str, Any]:
        """The file's content: the schema version, then the fields."""
        return {self.KIND: self.VERSION, **_fields_to_json(self)}

    @classmethod
    def from_json(cls, value: Any, name: str = "") -> Self:
        """Reads what `to_json` wrote.

        Raises LeanMoeError for another schema version and for unknown, missing or mistyped fields.
        """
        where = f"{cls.WHAT} {name}".strip()
        version = value.get(cls.KIND) if isinstance(value, dict) else None
        if version != cls.VERSION:
            raise LeanMoeError(
                f"{where} has schema version {version!r}: this leanmoe reads {cls.VERSION}"
            )
        content = {key: each for key, each in value.items() if key != cls.KIND}
        return _dataclass_from_json(cls, content, where)

    @classmethod
    def of(cls, **fields: Any) -> Self:
        """The results with these fields, given as the JSON values that the file would hold."""
        return cls.from_json({cls.KIND: cls.VERSION, **fields})

    @classmethod
    def read(cls, path: Path) -> Self:
        """Reads a file; raises LeanMoeError as `from_json` does."""
        return cls.from_json(read_json(path, cls.WHAT), str(path))

    def write(self, path: Path) -> None:
        """Writes the file, whole or not at all."""
        write_json(path, self.to_json())


def stored_as(key: str) -> dict[str, str]:
    """The metadata of a dataclass field that files call `key`."""
    return {"key": key}


def to_json(value: Any) -> Any:
    """A dataclass, tuple or mapping as JSON values; a class's own `to_json` is used."""
    if is_dataclass(value):
        own = getattr(value, "to_json", None)
        return _fields_to_json(value) if own is None else own()
    if isinstance(value, tuple | list):
        return [to_json(each) for each in value]
    if isinstance(value, Mapping):
        return {key: to_json(each) for key, each in value.items()}
    return value


def from_json(kind: type[T], value: Any, where: str) -> T:
    """Reads what `to_json` wrote of a `kind`; `where` names the place in messages.

    Raises LeanMoeError for unknown, missing and mistyped fields.
    """
    read: T = _read(kind, value, where)
    return read


def _fields_to_json(value: Any) -> dict[str, Any]:
    written = {}
    for each in fields(value):
        content = getattr(value, each.name)
        if _is_required(each) or content != _default(each):
            written[_key(each)] = to_json(content)
    return written


def _dataclass_from_json(kind: type[T], value: Any, where: str) -> T:
    if not isinstance(value, dict):
        raise LeanMoeError(f"{where} is {value!r}: it must be an object")
    by_key = {_key(each): each for each in fields(kind)}  # type: ignore[arg-type]
    for key in value:
        if key not in by_key:
            raise LeanMoeError(f"{where}: {key!r} is no field; its fields are {', '.join(by_key)}")
    hints = _hints(kind)  # type: ignore[arg-type]
    given = {}
    for key, each in by_key.items():
        if key in value:
            given[each.name] = _read(hints[each.name], value[key], f"{where}: {key}")
        elif _is_required(each):
            raise LeanMoeError(f"{where} is incomplete: {key} is missing")
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
    if origin is dict:
        content = _typed(dict, value, where)
        return {key: _read(arguments[1], each, f"{where}.{key}") for key, each in content.items()}
    if origin is Literal:
        return _typed(str, value, where)
    if hasattr(kind, "from_json"):
        return kind.from_json(value)
    if is_dataclass(kind) and isinstance(kind, type):
        return _dataclass_from_json(kind, value, where)
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
        raise LeanMoeError(f"{where} is {value!r}: it must be {_WORDS[kind]}")
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
