"""What inspect refuses before it reads a model."""

from __future__ import annotations

import pytest

from leanmoe.core.errors import LeanMoeError
from leanmoe.models.settings import InspectSettings


def test_a_bandwidth_is_above_0() -> None:
    InspectSettings(bandwidth=3350.0).check()
    with pytest.raises(LeanMoeError, match="--bandwidth is 0: it must be above 0"):
        InspectSettings(bandwidth=0.0).check()
