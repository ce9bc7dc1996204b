"""The run folder: one file a finished step, so that a run resumes where it was stopped."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from leanmoe.core.errors import LeanMoeError
from leanmoe.core.files import read_json, require_space, write_json, write_text

SETTINGS = "settings.json"
SPACE_BYTES = 200_000_000


class Settings(Protocol):
    """What a run was asked to do."""

    def to_json(self) -> dict[str, Any]:
        """All that its results depend on."""


@dataclass(frozen=True)
class RunFolder:
    """A folder with `settings.json` and a file for each step that is done."""

    path: Path

    @classmethod
    def open(cls, path: Path, settings: Settings, overwrite: bool, kind: str = "tune") -> RunFolder:
        """Creates the folder, or takes up the run in it if its settings are the same.

        Raises LeanMoeError when it holds another run (unless `overwrite`), something that is no
        run, or its disk is full. A run of which no step was finished is none to keep.
        """
        require_space(path, SPACE_BYTES, f"{kind} results")
        folder = cls(path)
        if path.exists() and not path.is_dir():
            raise LeanMoeError(f"output {path} is a file: give a folder")
        if path.exists() and any(path.iterdir()):
            folder._take_up(settings, overwrite, kind)
        write_json(path / SETTINGS, settings.to_json())
        return folder

    def _take_up(self, settings: Settings, overwrite: bool, kind: str) -> None:
        stored = self.path / SETTINGS
        if not stored.exists():
            raise LeanMoeError(f"output {self.path} is not empty and holds no {kind} run")
        found = read_json(stored, "settings")
        if found == settings.to_json() or self._holds_nothing_but(found, settings):
            return
        if not overwrite:
            changed = sorted(k for k, v in settings.to_json().items() if found.get(k) != v)
            raise LeanMoeError(
                f"output {self.path} holds a run with another {', '.join(changed)}: "
                "use --overwrite, or another folder"
            )
        for file in self.path.iterdir():
            if file.is_file():
                file.unlink()

    def _holds_nothing_but(self, found: Any, settings: Settings) -> bool:
        """Whether there are settings of such a run alone: it failed before its first step."""
        is_such = isinstance(found, dict) and set(found) == set(settings.to_json())
        return is_such and [entry.name for entry in self.path.iterdir()] == [SETTINGS]

    def step(self, name: str, compute: Callable[[], Any]) -> Any:
        """The stored result of step `name`, or `compute()` stored; adds the seconds it took."""
        path = self.path / f"{name}.json"
        if path.exists():
            return read_json(path, f"step {name}")["result"]
        started = time.monotonic()
        result = compute()
        write_json(path, {"seconds": time.monotonic() - started, "result": result})
        return result

    def seconds(self) -> dict[str, float]:
        """How long each stored step took."""
        taken = {}
        for path in sorted(self.path.glob("*.json")):
            stored = read_json(path, "step")
            if isinstance(stored, dict) and set(stored) == {"seconds", "result"}:
                taken[path.stem] = float(stored["seconds"])
        return taken

    def lines(self, name: str) -> Lines:
        """A file of JSON lines that grows one finished piece at a time."""
        return Lines(self.path / f"{name}.jsonl")


@dataclass(frozen=True)
class Lines:
    """Pieces of a long step, each stored as it is done."""

    path: Path

    def __iter__(self) -> Iterator[Any]:
        if not self.path.exists():
            return
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                return  # a line cut short by a crash ends what was done; it is computed again

    def append(self, piece: Any) -> None:
        """Adds one piece; the file is rewritten whole, so a crash loses at most this piece."""
        text = "".join(json.dumps(p) + "\n" for p in self) + json.dumps(piece) + "\n"
        write_text(self.path, text)
