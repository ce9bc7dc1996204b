"""GPUs by name or by file."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from leanmoe.core.errors import LeanMoeError
from leanmoe.predict.hardware.gpus import GPUS, Gpu, read_gpu

H200 = GPUS["h200"]


def test_hardware_by_name_or_by_file(tmp_path: Path) -> None:
    assert read_gpu("H200") == H200
    with pytest.raises(
        LeanMoeError, match=r"hardware 'h20o' is not known: did you mean.*known are"
    ):
        read_gpu("h20o")
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({**asdict(H200), "name": "mine"}))
    assert read_gpu(str(path)) == Gpu(**{**asdict(H200), "name": "mine"})
    for change, says in (
        ({"bandwidth": -1}, "bandwidth is -1: it must be above 0"),
        ({"bandwith": 1}, "unknown field 'bandwith': allowed are name, memory"),
        ({"per_node": "8"}, "per_node is '8': it must be a whole number"),
    ):
        path.write_text(json.dumps({**asdict(H200), **change}))
        with pytest.raises(LeanMoeError, match=says):
            read_gpu(str(path))
