"""What the right answers cost: paired over questions, the mean of batch draws."""

from __future__ import annotations

import numpy as np
import pytest

from leanmoe.eval.answers import Answers, loss_changes
from leanmoe.eval.settings import EvalSettings

SETTINGS = EvalSettings("reference")


def answers(loss_U: np.ndarray) -> Answers:
    return Answers(np.ones(len(loss_U), dtype=bool), loss_U, np.ones(len(loss_U), dtype=np.int64))


def test_the_change_is_that_of_the_mean_over_batch_draws() -> None:
    full = np.linspace(1.0, 2.0, 40)
    found = loss_changes(answers(full), [answers(full * 1.02), answers(full * 1.04)], SETTINGS)
    assert found is not None
    assert found["ratio"] == pytest.approx(0.03)


def test_too_few_questions_and_unknown_losses_give_no_change() -> None:
    few = answers(np.ones(19))
    assert loss_changes(few, [few], SETTINGS) is None
    unknown = Answers(np.ones(40, dtype=bool), None, None)
    assert loss_changes(unknown, [unknown], SETTINGS) is None
