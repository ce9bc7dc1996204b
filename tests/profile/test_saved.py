"""Profiles on disk: what is read is what was written, and damage is noticed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from leanmoe.core.errors import LeanMoeError
from leanmoe.plan import Rule
from leanmoe.profile.record import replay
from leanmoe.profile.saved import ARRAYS_NAME, JSON_NAME, Profile
from tests.profile.example import EXPERTS, LAYERS, TOP_K, made_up_profile


@pytest.mark.parametrize("bias", [True, False])
def test_what_was_saved_is_read(bias: bool, tmp_path: Path) -> None:
    made = made_up_profile(bias=bias)
    made.save(tmp_path)
    found = Profile.load(tmp_path)
    assert found.to_json() == made.to_json()
    assert (found.model, found.router, found.provenance) == (
        made.model,
        made.router,
        made.provenance,
    )
    np.testing.assert_array_equal(made.use_LE, found.use_LE)
    np.testing.assert_array_equal(made.mass_LK, found.mass_LK)
    np.testing.assert_array_equal(made.trace.logits_LTE, found.trace.logits_LTE)
    rule = Rule(guaranteed=2)
    assert replay(found, 1, rule, 8) == replay(made, 1, rule, 8)


def test_the_json_is_what_a_report_needs() -> None:
    shown = json.loads(json.dumps(made_up_profile().to_json(), allow_nan=False))
    assert shown["label"] == "measured"
    assert len(shown["layers"]) == LAYERS
    layer = shown["layers"][1]
    assert layer["decoder_layer"] == 2
    assert sum(layer["use"]) == pytest.approx(1)
    assert len(layer["use"]) == EXPERTS
    assert len(layer["mass"]) == TOP_K
    assert {"tokens", "measured", "uniform"} <= set(layer["distinct"][0])


def damage(folder: Path, change: Any) -> None:
    path = folder / JSON_NAME
    stored = json.loads(path.read_text())
    change(stored)
    path.write_text(json.dumps(stored))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda stored: stored.update(leanmoe_profile=1), "schema version 1: this leanmoe reads 2"),
        (lambda stored: stored.pop("router"), "is damaged"),
        (lambda stored: stored["model"].pop("experts"), "is damaged"),
        (lambda stored: stored["model"].update(experts=8), "is damaged"),
        (lambda stored: stored["profile"]["layers"].pop(), "is damaged"),
        (lambda stored: stored["arrays"].update(sha256="0"), "is not the one"),
        (lambda stored: stored["profile"]["layers"].append({}), "is damaged"),
        (lambda stored: stored["model"].update(top_k=3), r"mass_LK is \(2, 4\), not \(2, 3\)"),
        (lambda stored: stored["model"].update(experts=9), r"use_LE is \(2, 16\), not \(2, 9\)"),
    ],
)
def test_damage_is_named(change: Any, message: str, tmp_path: Path) -> None:
    made_up_profile().save(tmp_path)
    damage(tmp_path, change)
    with pytest.raises(LeanMoeError, match=message):
        Profile.load(tmp_path)


def test_files_that_are_missing_or_no_profile_are_named(tmp_path: Path) -> None:
    with pytest.raises(LeanMoeError, match=r"cannot read profile .*profile\.json"):
        Profile.load(tmp_path)
    (tmp_path / JSON_NAME).write_text("[1]")
    with pytest.raises(LeanMoeError, match="schema version None"):
        Profile.load(tmp_path)
    made_up_profile().save(tmp_path)
    (tmp_path / ARRAYS_NAME).unlink()
    with pytest.raises(LeanMoeError, match=r"cannot read profile .*profile\.safetensors"):
        Profile.load(tmp_path)


def test_nothing_is_left_of_a_save_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(LeanMoeError, match="No space left on device"):
        made_up_profile().save(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_reading_a_profile_needs_no_torch(tmp_path: Path) -> None:
    made_up_profile().save(tmp_path)
    program = (
        "import sys, pathlib; from leanmoe.profile.saved import Profile; "
        "import leanmoe.stats.paired, leanmoe.stats.paired; "
        f"Profile.load(pathlib.Path({str(tmp_path)!r})); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
