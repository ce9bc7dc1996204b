"""The run folder: one file a finished step, so that a run resumes where it was stopped.

A stored step is taken only where it was made with the same settings, weights, leanmoe (version and
commit) and torch, and a timed one only on the same machine. Other steps are measured again, and a
line on standard error says why.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from leanmoe.core.errors import LeanMoeError
from leanmoe.core.files import read_json, require_space, write_json, write_text
from leanmoe.core.provenance import MadeWith, made_with

SETTINGS = "settings.json"
SPACE_BYTES = 200_000_000


class RunSettings(Protocol):
    """What a run was asked to do."""

    @property
    def model(self) -> str:
        """The model it runs: a folder, a hub name or "reference"."""

    def to_json(self) -> dict[str, Any]:
        """All that its results depend on."""


@dataclass
class RunFolder:
    """A folder with `settings.json` and a file for each step that is done."""

    path: Path
    model: str
    """The model that the steps run."""
    _taken_part: dict[str, dict[str, str]] = field(default_factory=dict)
    """What each step that was used or computed was made with."""
    _explained: set[str] = field(default_factory=set)

    @classmethod
    def open(
        cls, path: Path, settings: RunSettings, overwrite: bool, kind: str = "tune"
    ) -> RunFolder:
        """Creates the folder, or takes up the run in it if its settings are the same.

        Raises LeanMoeError when it holds another run (unless `overwrite`), something that is no
        run, or its disk is full. A run of which no step was finished is none to keep.
        """
        require_space(path, SPACE_BYTES, f"{kind} results")
        folder = cls(path, settings.model)
        if path.exists() and not path.is_dir():
            raise LeanMoeError(f"output {path} is a file: give a folder")
        if path.exists() and any(path.iterdir()):
            folder._take_up(settings, overwrite, kind)
        write_json(path / SETTINGS, settings.to_json())
        return folder

    def _take_up(self, settings: RunSettings, overwrite: bool, kind: str) -> None:
        file = self.path / SETTINGS
        if not file.exists():
            raise LeanMoeError(f"output {self.path} is not empty and holds no {kind} run")
        stored = read_json(file, "settings")
        if stored == settings.to_json() or self._holds_nothing_but(stored, settings):
            return
        if not overwrite:
            changed = sorted(k for k, v in settings.to_json().items() if stored.get(k) != v)
            raise LeanMoeError(
                f"output {self.path} holds a run with another {', '.join(changed)}: "
                "use --overwrite, or another folder"
            )
        for entry in self.path.iterdir():
            if entry.is_file():
                entry.unlink()

    def _holds_nothing_but(self, stored: Any, settings: RunSettings) -> bool:
        """Whether there are settings of such a run alone: it failed before its first step."""
        is_such = isinstance(stored, dict) and set(stored) == set(settings.to_json())
        return is_such and [entry.name for entry in self.path.iterdir()] == [SETTINGS]

    @cached_property
    def now(self) -> MadeWith:
        """What a step would be made with now; read with the first step, when the model is here."""
        return made_with(self.model)

    def step(self, name: str, compute: Callable[[], Any], timed: bool = False) -> Any:
        """The stored result of step `name` if it is valid still, else `compute()`, stored.

        `timed` says that the result holds times, which another machine does not share.
        """
        path = self.path / f"{name}.json"
        if path.exists():
            stored = read_json(path, f"step {name}")
            if self._is_valid(name, stored.get("made_with"), timed):
                return stored["result"]
        started = time.monotonic()
        result = compute()
        now = self.now.to_json()
        seconds = time.monotonic() - started
        write_json(path, {"seconds": seconds, "made_with": now, "result": result})
        self._taken_part[name] = now
        return result

    def _is_valid(self, name: str, stored: Any, timed: bool) -> bool:
        """Whether what was made so can be used; the reason why not is said once."""
        different = self.now.differences(stored, timed)
        if not different:
            self._taken_part[name] = dict(stored)
            return True
        reason = ", ".join(different)
        if reason not in self._explained:
            self._explained.add(reason)
            print(
                f"leanmoe: {self.path} holds steps ({name} is the first) that were made with "
                f"{reason}: they are measured again",
                file=sys.stderr,
            )
        return False

    def made_with(self) -> list[dict[str, Any]]:
        """Every set of code, weights and machine that took part, with its steps' names."""
        groups: dict[str, dict[str, Any]] = {}
        for name, made in self._taken_part.items():
            group = groups.setdefault(json.dumps(made, sort_keys=True), {**made, "steps": []})
            group["steps"].append(name)
        return list(groups.values())

    def seconds(self) -> dict[str, float]:
        """How long each step of this run took when it was computed."""
        taken = {}
        for name in sorted(self._taken_part):
            path = self.path / f"{name}.json"
            if path.exists():
                taken[name] = float(read_json(path, "step")["seconds"])
        return taken

    def lines(self, name: str, timed: bool = False) -> Lines:
        """A file of JSON lines that grows one finished piece at a time; empty if it is not valid.

        What its pieces were made with stands in a file beside it.
        """
        lines = Lines(self.path / f"{name}.jsonl")
        note = self.path / f"{name}.made_with.json"
        stored = read_json(note, "provenance") if note.exists() else None
        if lines.path.exists() and not self._is_valid(name, stored, timed):
            lines.path.unlink()
        if not lines.path.exists():
            write_json(note, self.now.to_json())
            self._taken_part[name] = self.now.to_json()
        return lines


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
