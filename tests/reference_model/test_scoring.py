"""The packaged model scores text, with all experts and with fewer."""

from __future__ import annotations

import pytest

from leanmoe.core.errors import LeanMoeError
from leanmoe.models import reference
from leanmoe.scoring.rows import ScoredRow
from reference_model.scoring import Scorer

PROSE = (
    "The old man put down his cup and looked out of the window. It had been raining since the "
    "morning, and the road to the village was covered with water. He thought of his daughter, who "
    "had promised to come home before the end of the week, and of the letter that he had not yet "
    "found the courage to write. At last he rose, took his hat from the wall, and went out into "
    "the garden to see what the storm had left of his roses."
)


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    return Scorer(reference.path(), "cpu")


def test_fewer_experts_cost_and_all_are_back_afterwards(scorer: Scorer) -> None:
    row = ScoredRow((scorer.start_id, *scorer.encode(PROSE)))
    assert scorer.bytes_per_id[list(row.ids[1:])].sum() == len(PROSE.encode())

    def nats_per_token() -> float:
        return scorer.score([row], "prose")[0].nll / (len(row.ids) - 1)

    full = nats_per_token()
    with scorer.uniform_k(2):
        pair = nats_per_token()
    with scorer.uniform_k(8):
        assert nats_per_token() == full
    assert full < 3.6
    assert pair > full + 0.5
    with pytest.raises(LeanMoeError, match="k is 9"), scorer.uniform_k(9):
        pass


def test_padding_changes_nothing_and_is_not_counted(scorer: Scorer) -> None:
    ids = [scorer.start_id, *scorer.encode(PROSE)]
    rows = [ScoredRow(tuple(ids)), ScoredRow(tuple(ids[:20])), ScoredRow(tuple(ids[:40]), first=30)]
    with scorer.counting_experts() as counts_LE:
        padded = scorer.score(rows, "padded")
    apart = [scorer.score([row], "apart")[0] for row in rows]
    for mine, other in zip(padded, apart, strict=True):
        assert mine.nll == pytest.approx(other.nll, rel=0.02)
    assert (counts_LE.sum(dim=1) == 8 * sum(len(row.ids) - 1 for row in rows)).all()
