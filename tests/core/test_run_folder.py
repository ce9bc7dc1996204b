"""The run folder: resumes the same run, refuses another, and loses at most the step at hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from leanmoe.core import run_folder
from leanmoe.core.errors import LeanMoeError
from leanmoe.core.provenance import MadeWith
from leanmoe.core.run_folder import RunFolder


@dataclass(frozen=True)
class Asked:
    """Settings of a run."""

    model: str = "reference"
    margin: float = 0.005


SETTINGS = Asked()
NOW = {
    "leanmoe": "1.0", "commit": "0123456789ab", "torch": "2.0", "transformers": "5.0",
    "weights": "aa", "machine": "a processor, 2 cores",
}  # fmt: skip


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


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets what steps are made with from now on."""

    def set_to(**changed: str) -> None:
        monkeypatch.setattr(run_folder, "made_with", lambda _: MadeWith(**{**NOW, **changed}))

    set_to()
    return set_to


def run(folder: Path, loss: float, seconds: float) -> tuple[float, float]:
    """A run of one step that measures a loss and one that measures a time: what it results in."""
    steps = RunFolder.open(folder, SETTINGS, overwrite=False)
    return steps.step("loss", lambda: loss), steps.step("time", lambda: seconds, timed=True)


@pytest.mark.parametrize("changed", ["leanmoe", "commit", "torch", "transformers", "weights"])
def test_what_other_code_or_weights_measured_is_measured_again(
    changed: str,
    made: Callable[..., None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(tmp_path, 1.0, 2.0) == (1.0, 2.0)
    assert run(tmp_path, 3.0, 4.0) == (1.0, 2.0)
    assert not capsys.readouterr().err
    made(**{changed: "another"})
    assert run(tmp_path, 5.0, 6.0) == (5.0, 6.0)
    said = capsys.readouterr().err
    assert f"{changed} {NOW[changed]} (now another)" in said
    assert len(said.splitlines()) == 1, "a reason is said once"
    made()
    assert run(tmp_path, 7.0, 8.0) == (7.0, 8.0)


def test_losses_survive_another_machine_and_times_do_not(
    made: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, 1.0, 2.0)
    made(machine="another processor, 8 cores")
    steps = RunFolder.open(tmp_path, SETTINGS, overwrite=False)
    assert steps.step("loss", lambda: 3.0) == 1.0
    assert steps.step("time", lambda: 4.0, timed=True) == 4.0
    assert (
        "machine a processor, 2 cores (now another processor, 8 cores)" in capsys.readouterr().err
    )
    assert [(made.machine, made.steps) for made in steps.made_with()] == [
        ("a processor, 2 cores", ("loss",)),
        ("another processor, 8 cores", ("time",)),
    ]


@pytest.mark.usefixtures("made")
def test_a_step_of_before_provenance_was_stored_is_measured_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = RunFolder.open(tmp_path, SETTINGS, overwrite=False)
    (tmp_path / "loss.json").write_text(json.dumps({"seconds": 1.0, "result": 1.0}))
    assert steps.step("loss", lambda: 2.0) == 2.0
    assert "no provenance" in capsys.readouterr().err


@pytest.mark.usefixtures("made")
def test_a_moved_folder_stays_valid(tmp_path: Path) -> None:
    run(tmp_path / "here", 1.0, 2.0)
    (tmp_path / "here").rename(tmp_path / "there")
    assert run(tmp_path / "there", 3.0, 4.0) == (1.0, 2.0)


def test_the_second_commit_does_not_get_the_first_ones_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    save_file({"weight": torch.zeros(8)}, model / "model.safetensors")
    asked = replace(SETTINGS, model=str(model))

    def result(number: int) -> int:
        folder = RunFolder.open(tmp_path / "run", asked, overwrite=False)
        measured: int = folder.step("loss", lambda: number)
        return measured

    monkeypatch.setenv("LEANMOE_COMMIT", "000000000001")
    assert (result(1), result(2)) == (1, 1)
    monkeypatch.setenv("LEANMOE_COMMIT", "000000000002")
    assert (result(3), result(4)) == (3, 3)
    save_file({"weight": torch.ones(8)}, model / "model.safetensors")  # in place, of the same shape
    assert (result(5), result(6)) == (5, 5)
