"""What a verb may be asked: the fields of its settings class, each with its help and its reader.

    @dataclass(frozen=True)
    class TuneSettings:
        model: str = argument("A folder, a hub name, or 'reference'.")
        margin: float = option(0.005, "Largest increase in loss to accept.", parse=parse_share)

The command line, `--config run.toml` and the Python functions are made from these fields, so that
each default, help text and check stands once. A field without `option` is no option of the command
line; a file or a call may set it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from leanmoe.core.errors import LeanMoeError, unknown_name
from leanmoe.core.parsing import flag

Settings = TypeVar("Settings")

MODEL_HELP = "A folder, a name on the Hugging Face Hub, or 'reference'."
TEXT_HELP = "A .txt or .jsonl file, a folder, or a Hugging Face data set to take text from."
SEED_HELP = "Seed of every random choice."
DTYPE_HELP = "The number format to load weights in: float32, bfloat16 or float16."
TRUST_HELP = "Allow the model's own Python code to run."


@dataclass(frozen=True)
class Option:
    """How one field is asked for."""

    help: str
    parse: Callable[[str, str], Any] | None = None
    """Makes the field's value of an option's name and its words; without it typer reads them.

    Of an option that repeats it makes one value of each, or a list of several.
    """
    text: Callable[[Any], str] = str
    """The field's default in the words that `parse` reads."""
    is_argument: bool = False
    repeats: bool = False
    """Whether it may be given several times; its value is then a tuple."""
    is_required: bool = False
    """Whether the command line must have it, although a call in Python need not."""
    metavar: str | None = None


def option(default: Any, help: str, **more: Any) -> Any:
    """A field of a settings class that the command line has as `--its-name`."""
    return field(default=default, metadata={"option": Option(help, **more)})


def argument(help: str, default: Any = MISSING, **more: Any) -> Any:
    """A field of a settings class that the command line has by its place."""
    about = {"option": Option(help, is_argument=True, **more)}
    return field(metadata=about) if default is MISSING else field(default=default, metadata=about)


class _VerbPackage(ModuleType):
    """A verb's package, which runs the verb where it is called: `leanmoe.tune("reference")`."""

    def __call__(self, *arguments: Any, **settings: Any) -> Any:
        verb = getattr(import_module("leanmoe.api"), self.__name__.rpartition(".")[2])
        return verb(*arguments, **settings)


def make_callable(package: str) -> None:
    """Makes a package of leanmoe callable, as the function of `leanmoe.api` that has its name.

    `import leanmoe.tune.settings` puts the package where `leanmoe.tune` is looked up, so that the
    function cannot stand there itself.
    """
    sys.modules[package].__class__ = _VerbPackage


def numbers_text(values: Iterable[object]) -> str:
    """Numbers as `parse_numbers` reads them: "1,8,32"."""
    return ",".join(map(str, values))


def percent_text(share: float) -> str:
    """A share as `parse_share` reads it: "0.5%"."""
    return f"{100 * share:g}%"


def option_of(settings_field: Any) -> Option | None:
    """What is said of a dataclass's field; None where it is no option."""
    about: Option | None = settings_field.metadata.get("option")
    return about


def make_settings(kind: type[Settings], values: Mapping[str, Any]) -> Settings:
    """Settings from values by name, of a command line, a file or a call; words are parsed.

    Raises LeanMoeError, with near names, for a name that is no setting, and for one that is
    missing.
    """
    known = {each.name: each for each in fields(kind)}  # type: ignore[arg-type]
    made: dict[str, Any] = {}
    for name, value in values.items():
        if name not in known:
            raise unknown_name("setting", name, known)
        about = option_of(known[name])
        made[name] = value if about is None else _read(known[name], value, about)
    for name, each in known.items():
        if name not in made and each.default is MISSING and each.default_factory is MISSING:
            raise LeanMoeError(f"{name} is not given")
    return kind(**made)


def _read(settings_field: Any, value: Any, about: Option) -> Any:
    """The value of a field: words are parsed, lists become tuples."""
    if about.repeats:
        several = [value] if isinstance(value, str | Path) else value or ()
        read = [_parsed(settings_field, each, about) for each in several]
        return tuple(v for each in read for v in (each if isinstance(each, list) else [each]))
    is_list = isinstance(value, list | tuple)
    if is_list and value and about.parse and all(isinstance(each, str) for each in value):
        value = ",".join(value)
    if isinstance(value, list):
        return tuple(value)
    return _parsed(settings_field, value, about)


def _parsed(settings_field: Any, value: Any, about: Option) -> Any:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    is_word = settings_field.type in ("str", "str | None")
    if is_number and (
        is_word or (about.parse and not isinstance(settings_field.default, int | float))
    ):
        value = str(value)  # 8 where several numbers or 75% may stand is "8"
    if about.parse is None and isinstance(value, str) and "Path" in settings_field.type:
        return Path(value)
    if about.parse is None or not isinstance(value, str):
        return value
    return about.parse(flag(settings_field.name), value)


def read_config(path: Path, known: Iterable[str]) -> dict[str, Any]:
    """A TOML file's values by option: names with - or _, values as the command line has them.

    Raises LeanMoeError for a file that cannot be read, for a table, and for a name that is no
    option.
    """
    import tomllib  # only where a file is given

    try:
        content = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise LeanMoeError(f"cannot read config {path}: {error}") from error
    names = list(known)
    values = {}
    for key, value in content.items():
        name = key.replace("-", "_")
        if name not in names:
            shown = [each.replace("_", "-") for each in names]
            raise unknown_name(f"config {path}: the option", key.replace("_", "-"), shown)
        if isinstance(value, dict):
            raise LeanMoeError(f"config {path}: {key} is a table: it must be one value or a list")
        values[name] = value
    return values
