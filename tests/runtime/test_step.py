"""Which step and which rules each token of a call belongs to."""

from __future__ import annotations

import pytest
import torch

from leanmoe.core.errors import LeanMoeError
from leanmoe.plan import Band, Fingerprint, Plan, Rule
from leanmoe.runtime.step import scoring_parts, served_parts

MODEL = Fingerprint("Model", 1, 1, 8, 4)
FEW, MANY, PROMPT = (Rule(top_k=1),), (Rule(top_k=3),), (Rule(top_k=2),)
PLAN = Plan.banded(MODEL, (Band(2, FEW), Band(None, MANY)), PROMPT)


def test_a_served_call_whose_predictions_are_all_read_is_one_step() -> None:
    (part,) = served_parts(PLAN, (3, 2), None, None)
    assert part.index_BT is None
    assert part.rules == MANY


def test_padding_does_not_count_towards_the_band() -> None:
    padding_SN = torch.tensor([[False], [True], [True]])
    (part,) = served_parts(PLAN, (3, 1), padding_SN, None)
    assert part.rules == FEW


def test_tokens_whose_prediction_nobody_reads_are_prompt() -> None:
    prompt, reply = served_parts(PLAN, (2, 3), None, 1)
    assert prompt.is_prompt
    assert prompt.index_BT is not None
    assert prompt.index_BT.tolist() == [[0, 1, 3, 4]]
    assert prompt.rules == PROMPT
    assert reply.index_BT is not None
    assert reply.index_BT.tolist() == [[2, 5]]
    assert reply.rules == FEW


def test_a_scored_position_of_every_decode_batch_is_a_step() -> None:
    prompt, reply = scoring_parts(PLAN, (4, 3), None, 2, 1)
    assert prompt.index_BT is not None
    assert prompt.index_BT.flatten().tolist() == [0, 3, 6, 9]
    assert reply.index_BT is not None
    assert reply.index_BT.tolist() == [[1, 4], [2, 5], [7, 10], [8, 11]]
    assert (prompt.rules, reply.rules) == (PROMPT, FEW)


def test_sequences_that_make_no_whole_steps_are_refused() -> None:
    with pytest.raises(LeanMoeError, match="decode_batch 2 must divide it"):
        scoring_parts(PLAN, (3, 2), None, 2, 0)
