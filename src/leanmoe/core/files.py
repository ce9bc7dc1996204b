"""Files that are whole or absent: written under a temporary name, then renamed."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from leanmoe.core.errors import LeanMoeError

JSON_LINES = "a file of JSON lines holds one object a line, as no array and no indented JSON does"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; renames it onto `path` if the body succeeds.

    Raises LeanMoeError when the folder cannot be written or the disk is full; nothing is left
    half-written in either case.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise LeanMoeError(f"cannot write {path}: {reason}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes `text` as UTF-8, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON; NaN and infinity are refused, since JSON has neither."""
    try:
        text = json.dumps(value, indent=1, allow_nan=False)
    except ValueError as error:
        raise LeanMoeError(f"cannot write {path}: a result is not a finite number") from error
    write_text(path, text + "\n")


def write_with(path: Path, write: Callable[[Path], object]) -> None:
    """Lets a library that wants a path of its own (safetensors, numpy) write atomically too."""
    with replacing(path) as temporary:
        write(temporary)


def read_text(path: Path, what: str) -> str:
    """Reads UTF-8, or UTF-16 with its byte order mark; `what` names the file in the error.

    Raises LeanMoeError for what is no text: other bytes, and zeros as binary files have them.
    """
    try:
        with path.open("rb") as file:
            is_utf16 = file.read(2) in (BOM_UTF16_LE, BOM_UTF16_BE)
        text = path.read_text(encoding="utf-16" if is_utf16 else "utf-8-sig")
    except UnicodeError as error:
        where = getattr(error, "start", None)
        reason = "it ends too early" if where is None else f"byte {where} is invalid"
        raise LeanMoeError(f"cannot read {what} {path}: it is not UTF-8 text: {reason}") from error
    except OSError as error:
        raise LeanMoeError(f"cannot read {what} {path}: {error.strerror or error}") from error
    if "\0" in text:
        raise LeanMoeError(f"cannot read {what} {path}: it is not UTF-8 text: it holds zeros")
    return text


def read_json(path: Path, what: str) -> Any:
    """Reads a JSON file; `what` names it in the error ("plan", "results")."""
    text = read_text(path, what)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise LeanMoeError(
            f"{what} {path} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise LeanMoeError(f"{what} {path} is not JSON that can be read: {error}") from error


def read_json_lines(path: Path, what: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each line's object, and the words that name the line in an error; empty lines are left out.

    Only a line feed ends a line: JSON strings may hold the other characters that Unicode calls line
    ends. Raises LeanMoeError, naming the line, for what is no JSON object.
    """
    for number, line in enumerate(read_text(path, what).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{what} {path} line {number}"
        try:
            value = json.loads(line)
            if "\\u" in line:
                json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise LeanMoeError(f"{where} holds half of a character, a lone surrogate") from error
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", str(error))
            hint = "" if number > 1 else f"; {JSON_LINES}"
            raise LeanMoeError(f"{where} is not JSON: {reason}{hint}") from error
        if not isinstance(value, dict):
            raise LeanMoeError(f"{where} is a {type(value).__name__}: {JSON_LINES}")
        yield where, value


def size_text(size: int) -> str:
    """Bytes in the largest decimal unit that leaves at least 1: "310 MB", "4.2 kB"."""
    value, unit = float(size), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.3g} {unit}"


def require_space(folder: Path, needed_bytes: int, purpose: str) -> None:
    """Refuses early when `folder`'s disk has fewer than `needed_bytes` free."""
    existing = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise LeanMoeError(
            f"not enough disk space in {folder} for {purpose}: "
            f"{size_text(free)} free, {size_text(needed_bytes)} needed"
        )
