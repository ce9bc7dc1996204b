"""What replies are worth: where they part, what they repeat, which answer they hold."""

from __future__ import annotations

from itertools import combinations

import pytest

from leanmoe.core.errors import LeanMoeError
from leanmoe.stats.replies import (
    NUMBER,
    answer_in,
    compiled,
    first_divergence,
    pass_at,
    repeated_share,
    until,
)


def test_replies_part_at_the_first_token_that_differs() -> None:
    assert first_divergence([1, 2, 3], [1, 2, 4]) == 2
    assert first_divergence([1, 2], [1, 2]) is None
    assert first_divergence([1, 2], [1, 2, 3]) == 2


def test_a_reply_ends_before_its_end_token() -> None:
    assert until([5, 6, 0, 7], frozenset({0, 9})) == [5, 6]
    assert until([5, 6], frozenset({0})) == [5, 6]


def test_repetition_is_the_share_of_pieces_that_were_there_before() -> None:
    assert repeated_share([1, 2, 3, 4, 5]) == 0
    assert repeated_share([1] * 7) == pytest.approx(3 / 4)
    assert repeated_share([1, 2]) == 0


@pytest.mark.parametrize("right", range(5))
def test_pass_at_counts_the_draws_that_hold_a_right_reply(right: int) -> None:
    replies = [number < right for number in range(4)]
    for tries in range(1, 5):
        draws = list(combinations(replies, tries))
        assert pass_at(4, right, tries) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_pass_at_of_more_tries_than_replies_is_refused() -> None:
    with pytest.raises(LeanMoeError, match="pass@5 of 4"):
        pass_at(4, 1, 5)


def test_the_answer_is_the_last_match_without_commas() -> None:
    assert answer_in("3 and 4 make 1,007.", compiled(NUMBER)) == "1007"
    assert answer_in("none", compiled(NUMBER)) is None
    assert answer_in("#### 8 ####9", compiled(r"#### ?(\d)")) == "9"
    with pytest.raises(LeanMoeError, match="no regular expression"):
        compiled("(")
