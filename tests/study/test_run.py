"""Where the study's quality comes from."""

from __future__ import annotations

from pathlib import Path

import pytest

from leanmoe.core.errors import LeanMoeError
from leanmoe.study.run import find_quality, searched_plan
from leanmoe.study.settings import StudySettings

RESULTS = Path(__file__).parents[2] / "benchmarks/results"


def test_quality_may_be_left_out_or_read_from_an_earlier_study(tmp_path: Path) -> None:
    assert find_quality(StudySettings(quality="none"), tmp_path, "") is None
    (path,) = RESULTS.glob("*-study.json")
    found = find_quality(StudySettings(quality=str(path)), tmp_path, "")
    assert found is not None
    assert found.label == "measured"


def test_what_is_no_tune_run_is_refused() -> None:
    (path,) = RESULTS.glob("*-study.json")
    with pytest.raises(LeanMoeError, match=r"is not the results\.json of leanmoe tune"):
        searched_plan(path)
