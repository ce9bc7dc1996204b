"""`leanmoe prune` from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from leanmoe.models.shape import read_shape
from leanmoe.plan import Plan
from tests.cli.test_main import run


def test_a_checkpoint_with_fewer_experts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["prune", "reference", "--keep", "50%", "--tokens", "512", "--json"]
    code, out, _ = run(capsys, *command, "-o", str(tmp_path / "out"))
    assert code == 0
    found = json.loads(out)
    assert all(len(experts) == 32 for experts in found["kept"])
    assert found["bytes_after"] < found["bytes_before"]
    assert read_shape(str(tmp_path / "out")).experts == 32
    code, _, err = run(capsys, *command, "-o", str(tmp_path / "out"))
    assert code == 1
    assert "exists and is not empty" in err
    assert err.count("\n") == 1  # before experts are watched


def test_a_plan_touches_no_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["prune", "reference", "--criterion", "even", "--keep", "48", "--as-plan"]
    code, out, _ = run(capsys, *command, "-o", str(tmp_path))
    assert code == 0
    assert "48 of 64 experts remain" in out
    plan = Plan.from_json(json.loads((tmp_path / "plan.json").read_text()))
    plan.check(read_shape("reference").fingerprint())
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--keep", "12.5%"], "a token needs 8"),
        (["--keep", "half"], "a share like 75%"),
        (["--criterion", "reep"], "did you mean reap"),
        (["--tokens", "3"], "at least 16"),
        (["--text", "/no/such.txt"], "does not exist"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    code, _, err = run(capsys, "prune", "reference", *arguments, "-o", str(tmp_path / "out"))
    assert code == 1
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()
