"""Runs of different seeds are tested together, the same seed twice or another size is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.renormalise.measure import joined, rules_of
from leanmoe.core.errors import LeanMoeError
from tests.reference_model.conftest import TINY_SOFTMAX


def test_seeds_of_two_runs_stand_beside_each_other(tmp_path: Path) -> None:
    sizes = TINY_SOFTMAX.model
    models = [{"seed": 0, "loss": {name: {} for name in rules_of(sizes)}}]
    path = tmp_path / "first.json"
    path.write_text(json.dumps({"models": models}))
    assert joined(path, [1], sizes) == models
    with pytest.raises(LeanMoeError, match="holds seed 0 already"):
        joined(path, [0, 1], sizes)
    path.write_text(json.dumps({"models": [{"seed": 0, "loss": {"1 of 2": {}}}]}))
    with pytest.raises(LeanMoeError, match="another size's"):
        joined(path, [1], sizes)
