"""What is measured on the reference model: the paper's shapes, once for the same settings."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from leanmoe.plan import Fingerprint, Plan, Rule
from leanmoe.study import quality
from leanmoe.study.quality import SHAPES, Case, saved_quality, shape_rules
from leanmoe.study.settings import StudySettings


def ks(name: str, layers: int = 5) -> list[int | None]:
    model = Fingerprint("Made", layers, layers, 64, 8)
    return [rule.top_k for rule in shape_rules(model, SHAPES[name])]


def test_shapes_are_the_papers_lines() -> None:
    assert ks("(6, 8, 8, 61), the paper's best") == [6, 6, 7, 8, 8]
    assert ks("falling, 8 to 4") == [8, 7, 6, 5, 4]
    assert ks("rising, 4 to 8") == [4, 5, 6, 7, 8]
    assert ks("hill, 4 to 8 to 4") == [4, 6, 8, 6, 4]
    assert ks("valley, 8 to 4 to 8") == [8, 6, 4, 6, 8]
    assert ks("falling, 8 to 4", layers=1) == [8]


def test_losses_are_measured_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def few(_model: Any, shape: Any, *_rest: Any) -> Iterator[Case]:
        print_ = shape.fingerprint()
        yield Case("k", "k=1", 1, 1.0, Plan.uniform(print_, Rule(top_k=1)))
        yield Case("k", "k=8", 8, 1.0, Plan.uniform(print_, Rule(top_k=8)))

    monkeypatch.setattr(quality, "_cases", few)
    settings = StudySettings(quick=True)
    found = saved_quality(settings, tmp_path, "leanmoe study")
    fewest, full = (row.increase for row in found.rows)
    assert fewest.low > 0.1
    assert full.ratio == pytest.approx(0, abs=1e-4)
    assert found.heldout.documents >= 20
    monkeypatch.setattr(quality, "measure_quality", lambda *_settings: pytest.fail("again"))
    assert saved_quality(settings, tmp_path, "leanmoe study") == found
