"""The run folder: one file a finished step, so that a run resumes where it was stopped.

A stored step is taken only where it was made with the same settings, weights, leanmoe (version and
commit) and torch, and a timed one only on the same machine. Other steps are measured again, and a
line on standard error says why.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from leanmoe.core.errors import LeanMoeError
from leanmoe.core.files import read_json, require_space, write_json
from leanmoe.core.provenance import MadeWith, StepsMadeWith, made_with
from leanmoe.core.schema import all_fields

SETTINGS = "settings.json"
SPACE_BYTES = 200_000_000


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
    def open(cls, path: Path, settings: Any, overwrite: bool, kind: str = "tune") -> RunFolder:
        """Creates the folder, or takes up the run in it if its settings are the same.

        `settings` is a dataclass of all that the results depend on; its `model` is what runs.
        Raises LeanMoeError when it holds another run (unless `overwrite`), something that is no
        run, or its disk is full. A run of which no step was finished is none to keep.
        """
        require_space(path, SPACE_BYTES, f"{kind} results")
        folder = cls(path, settings.model)
        if path.exists() and not path.is_dir():
            raise LeanMoeError(f"output {path} is a file: give a folder")
        if path.exists() and any(path.iterdir()):
            folder._take_up(all_fields(settings), overwrite, kind)
        write_json(path / SETTINGS, all_fields(settings))
        return folder

    def _take_up(self, settings: dict[str, Any], overwrite: bool, kind: str) -> None:
        file = self.path / SETTINGS
        if not file.exists():
            raise LeanMoeError(f"output {self.path} is not empty and holds no {kind} run")
        stored = read_json(file, "settings")
        if stored == settings or self._holds_nothing_but(stored, settings):
            return
        if not overwrite:
            changed = sorted(k for k, v in settings.items() if stored.get(k) != v)
            raise LeanMoeError(
                f"output {self.path} holds a run with another {', '.join(changed)}: "
                "use --overwrite, or another folder"
            )
        for entry in self.path.iterdir():
            if entry.is_file():
                entry.unlink()

    def _holds_nothing_but(self, stored: Any, settings: dict[str, Any]) -> bool:
        """Whether there are settings of such a run alone: it failed before its first step."""
        is_such = isinstance(stored, dict) and set(stored) == set(settings)
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

    def made_with(self) -> tuple[StepsMadeWith, ...]:
        """Every set of code, weights and machine that took part, with its steps' names."""
        groups: dict[tuple[tuple[str, str], ...], list[str]] = {}
        for name, made in self._taken_part.items():
            groups.setdefault(tuple(made.items()), []).append(name)
        return tuple(StepsMadeWith(**dict(made), steps=tuple(s)) for made, s in groups.items())

    def seconds(self) -> dict[str, float]:
        """How long each step of this run took when it was computed."""
        taken = {}
        for name in sorted(self._taken_part):
            path = self.path / f"{name}.json"
            if path.exists():
                taken[name] = float(read_json(path, "step")["seconds"])
        return taken
