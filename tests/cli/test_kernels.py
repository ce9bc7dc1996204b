"""`leanmoe kernels list`: whole in a narrow terminal, and as JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from leanmoe.kernels.triton.tuned_tiles import SHIPPED, Tuned
from tests.cli.test_main import run


def test_a_table_for_each_gpu_fits_a_narrow_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = run(capsys, "kernels", "list", "--output", str(tmp_path))
    assert (code, err) == (0, "")
    assert "…" not in out
    lines = [line.strip() for line in out.splitlines()]
    shipped = [Tuned.load(path) for path in SHIPPED.glob("*.json")]
    for gpu in {tuned.gpu for tuned in shipped}:
        assert lines.count(gpu) == 1
    assert sum(line.endswith(" shipped") for line in lines) == len(shipped)


def test_a_model_to_list_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "kernels", "list", "reference")
    assert (code, "leave out reference" in err) == (1, True)


def test_json_lists_every_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    _, out, _ = run(capsys, "kernels", "list", "--output", str(tmp_path), "--json")
    assert len(json.loads(out)) == len(list(SHIPPED.glob("*.json")))
