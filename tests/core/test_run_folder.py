"""The run folder: resumes the same run, refuses another, and loses at most the step at hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from leanmoe.core.errors import LeanMoeError
from leanmoe.core.run_folder import RunFolder
from leanmoe.tune.settings import TuneSettings

SETTINGS = TuneSettings(model="reference")


def test_a_step_runs_once(tmp_path: Path) -> None:
    runs: list[int] = []

    def compute() -> list[int]:
        runs.append(1)
        return [1, 2]

    first = RunFolder.open(tmp_path, SETTINGS, overwrite=False).step("front", compute)
    again = RunFolder.open(tmp_path, SETTINGS, overwrite=False).step("front", compute)
    assert (first, again, len(runs)) == ([1, 2], [1, 2], 1)


def test_a_step_that_fails_leaves_no_file(tmp_path: Path) -> None:
    folder = RunFolder.open(tmp_path, SETTINGS, overwrite=False)

    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        folder.step("front", interrupted)
    assert [p.name for p in tmp_path.iterdir()] == ["settings.json"]
    assert folder.step("front", lambda: 3) == 3


def test_another_run_is_refused_unless_overwritten(tmp_path: Path) -> None:
    RunFolder.open(tmp_path, SETTINGS, overwrite=False).step("front", lambda: 1)
    other = replace(SETTINGS, margin=0.01)
    with pytest.raises(LeanMoeError, match="another margin"):
        RunFolder.open(tmp_path, other, overwrite=False)
    assert RunFolder.open(tmp_path, other, overwrite=True).step("front", lambda: 2) == 2


def test_a_run_that_failed_before_its_first_step_is_in_nobodys_way(tmp_path: Path) -> None:
    RunFolder.open(tmp_path, replace(SETTINGS, model="mistyped"), overwrite=False)
    assert RunFolder.open(tmp_path, SETTINGS, overwrite=False).step("front", lambda: 2) == 2


def test_settings_of_something_else_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text('{"editor.fontSize": 12}')
    with pytest.raises(LeanMoeError, match="use --overwrite, or another folder"):
        RunFolder.open(tmp_path, SETTINGS, overwrite=False)
    assert (tmp_path / "settings.json").read_text() == '{"editor.fontSize": 12}'


def test_a_folder_that_is_no_run_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(LeanMoeError, match="holds no tune run"):
        RunFolder.open(tmp_path, SETTINGS, overwrite=True)
    assert (tmp_path / "thesis.txt").read_text() == "precious"


def test_pieces_survive_a_line_cut_short(tmp_path: Path) -> None:
    pieces = RunFolder.open(tmp_path, SETTINGS, overwrite=False).lines("sensitivity")
    pieces.append({"layer": 0})
    pieces.append({"layer": 1})
    pieces.path.write_text(pieces.path.read_text()[:-5])
    assert list(pieces) == [{"layer": 0}]
    pieces.append({"layer": 1})
    assert list(pieces) == [{"layer": 0}, {"layer": 1}]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"loads": (8, 1)}, "loads is"),
        ({"loads": ()}, "loads is"),
        ({"margin": 0.0}, "margin is 0.0"),
        ({"confidence": 1.0}, "confidence is 1.0"),
        ({"repeats": 1}, "repeats is 1"),
        ({"input_tokens": 4}, "input-tokens is 4"),
    ],
)
def test_settings_out_of_range_are_named(changed: dict[str, object], message: str) -> None:
    with pytest.raises(LeanMoeError, match=message):
        replace(SETTINGS, **changed).check()  # type: ignore[arg-type]


def test_bands_meet_between_loads() -> None:
    assert replace(SETTINGS, loads=(1, 8, 32)).bands() == (2, 16, 64)
    assert TuneSettings.from_json(SETTINGS.to_json()) == SETTINGS
