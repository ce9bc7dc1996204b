"""A verb's command made from its settings class: options, defaults and help come from the fields.

A verb is a function of `settings` and of what the command line alone has, such as `output`. Typer
reads a signature in which `settings` is replaced by one parameter for each field that is an option,
and which has `--config`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import MISSING, fields
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer

from leanmoe.core.options import Option, make_settings, option_of, read_config

CONFIG = "config"


def command_line() -> str:
    """The command line as it was typed, for provenance."""
    return " ".join(["leanmoe", *sys.argv[1:]])


def as_command(verb: Callable[..., None]) -> Callable[..., None]:
    """The verb as a function that typer can read."""
    hints = get_type_hints(verb, include_extras=True)
    if "settings" not in hints:
        return verb
    kind = hints["settings"]
    theirs = [
        _parameter(each, get_type_hints(kind)[each.name])
        for each in fields(kind)
        if option_of(each) is not None
    ]
    own = [
        each.replace(annotation=hints[each.name], kind=Parameter.KEYWORD_ONLY)
        for each in signature(verb).parameters.values()
        if each.name != "settings"
    ]

    def run(**values: Any) -> None:
        del values[CONFIG]  # its callback has read it
        given = {each.name: values.pop(each.name) for each in theirs}
        settings = make_settings(kind, {k: v for k, v in given.items() if v is not None})
        settings.check()
        verb(settings, **values)

    parameters = [*theirs, *own, _config()]
    run.__doc__ = verb.__doc__
    run.__annotations__ = {each.name: each.annotation for each in parameters}
    run.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    return run


def _parameter(field: Any, hint: Any) -> Parameter:
    """A field as typer's argument or option."""
    about = option_of(field)
    assert about is not None
    shown = _default(field, about)
    words = _words(hint, about, is_optional=shown is None)
    if about.is_argument:
        info: Any = typer.Argument(help=about.help, metavar=about.metavar)
    else:
        info = typer.Option(*_flags(field, words), help=about.help, metavar=about.metavar)
    return Parameter(
        field.name, Parameter.KEYWORD_ONLY, default=shown, annotation=Annotated[words, info]
    )


def _default(field: Any, about: Option) -> Any:
    if field.default is MISSING:
        return Parameter.empty
    if field.default in (None, ()):
        return Parameter.empty if about.is_required else None
    return field.default if about.parse is None else about.text(field.default)


def _words(hint: Any, about: Option, is_optional: bool) -> Any:
    """The type that typer reads: words where the field has a reader of its own."""
    if about.repeats:
        (inner, *_) = (str,) if about.parse else get_args(hint)
        several: Any = list[inner]  # type: ignore[valid-type]
        return several | None if is_optional else several
    if about.parse is None:
        return hint
    return str | None if is_optional else str


def _flags(field: Any, words: Any) -> tuple[str, ...]:
    """A switch has one flag; one that is on has the two, to put it off."""
    plain = "--" + field.name.replace("_", "-")
    return (plain,) if words is bool and not field.default else ()


def _config() -> Parameter:
    info = typer.Option(
        "--config",
        help="A TOML file with values of these options; the command line goes before it.",
        is_eager=True,
        callback=_use_config,
    )
    return Parameter(
        CONFIG, Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[Path | None, info]
    )


def _use_config(context: typer.Context, path: Path | None) -> Path | None:
    """Makes the file's values the defaults of the other options."""
    if path is None:
        return None
    known = {
        max(each.opts, key=len).lstrip("-").replace("-", "_"): each
        for each in context.command.params
        if each.name not in (CONFIG, "help")
    }
    values = read_config(path, known)
    context.default_map = {}
    for name, value in values.items():
        option: Any = known[name]
        several = option.multiple if hasattr(option, "multiple") else option.nargs != 1
        is_list = isinstance(value, list)
        if several and not is_list:
            value = [value]
        elif is_list and not several:
            value = ",".join(str(each) for each in value)
        context.default_map[option.name] = value
    return path
