"""Results of eval that are committed are read and written alike."""

from __future__ import annotations

from pathlib import Path

import pytest

from leanmoe.results.eval import EvalResults
from tests.results.committed import committed, content, without_nulls


@pytest.mark.parametrize("path", committed("leanmoe_eval"), ids=lambda path: path.name)
def test_committed_results_are_read_and_written_alike(path: Path) -> None:
    results = EvalResults.load(path)
    assert without_nulls(results.to_json()) == without_nulls(content(path))
