"""Which results of several GPUs may stand beside each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.vllm.several_gpus import joined

SETTINGS = dict.fromkeys(
    ("shape", "layers", "fp8", "routings", "prompt", "tiles", "no_compile", "small_steps",
     "experts"), "x"
)  # fmt: skip


def result(path: Path, layout: str, **settings: str) -> Path:
    made = {"hardware": "a GPU", "versions": {}, "commit": "abc"}
    content: dict[str, Any] = {"provenance": made, "settings": {**SETTINGS, **settings}}
    path.write_text(json.dumps(content | {"layouts": {layout: {"gpus": 1}}}))
    return path


def test_layouts_of_several_runs_are_joined(tmp_path: Path) -> None:
    paths = [result(tmp_path / "a.json", "1"), result(tmp_path / "b.json", "tp2")]
    assert list(joined(paths)) == ["1", "tp2"]


def test_other_settings_and_the_same_layout_are_refused(tmp_path: Path) -> None:
    first = result(tmp_path / "a.json", "1")
    with pytest.raises(ValueError, match="prompt is '64', not 'x'"):
        joined([first, result(tmp_path / "b.json", "tp2", prompt="64")])
    with pytest.raises(ValueError, match="has layout 1, as another file has"):
        joined([first, result(tmp_path / "c.json", "1")])
    (tmp_path / "d.json").write_text("{}")
    with pytest.raises(ValueError, match="is no result of this benchmark"):
        joined([tmp_path / "d.json"])
