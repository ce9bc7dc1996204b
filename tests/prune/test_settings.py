"""What a pruning may be asked, and what it says to anything else."""

from __future__ import annotations

import pytest

from leanmoe.core.errors import LeanMoeError
from leanmoe.prune.settings import PruneSettings


def test_what_is_out_of_range_is_named() -> None:
    PruneSettings("reference").check()
    with pytest.raises(LeanMoeError, match="--tokens is 3: it must be at least 16"):
        PruneSettings("reference", tokens=3).check()
