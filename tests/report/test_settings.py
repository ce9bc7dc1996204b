"""What a page is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from leanmoe.core.errors import LeanMoeError
from leanmoe.core.options import make_settings
from leanmoe.report.settings import ReportSettings


def test_a_page_needs_its_run() -> None:
    settings = make_settings(ReportSettings, {"run": Path("runs/demo")})
    settings.check()
    assert settings.run == Path("runs/demo")
    with pytest.raises(LeanMoeError, match="run is not given"):
        make_settings(ReportSettings, {})
