"""What a study refuses before it computes anything."""

from __future__ import annotations

import pytest

from leanmoe.core.errors import LeanMoeError
from leanmoe.study.settings import StudySettings


@pytest.mark.parametrize("quality", ["measured", "none", "runs/old/study.json"])
def test_where_quality_may_come_from(quality: str) -> None:
    StudySettings(quality=quality).check()


def test_quality_from_elsewhere_is_refused() -> None:
    with pytest.raises(LeanMoeError, match="--quality is 'guessed'"):
        StudySettings(quality="guessed").check()
