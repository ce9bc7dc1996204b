"""How replies differ, on replies made by hand."""

from __future__ import annotations

import numpy as np
import pytest

from leanmoe.eval.generate import agreement, mean_over_prompts


def test_replies_that_never_part_count_as_their_whole_length() -> None:
    found = agreement([[1, 2, 3], [4, 5, 6]], [[1, 2, 3], [4, 0, 6]], 3)
    assert found.same == 0.5
    assert found.mean == 2.0
    assert found.tokens == 3


def test_the_interval_of_a_mean_is_students() -> None:
    found = mean_over_prompts(np.array([1.0, 2.0, 3.0]), 0.95)
    assert found.mean == pytest.approx(2.0)
    assert found.high - found.mean == pytest.approx(4.302653 / 3**0.5, rel=1e-5)
    assert found.mean - found.low == pytest.approx(found.high - found.mean)
