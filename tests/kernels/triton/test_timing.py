"""Times of calls on a GPU, replayed from a graph."""

from __future__ import annotations

import pytest
import torch

from leanmoe.kernels.triton import timing


def test_the_median_is_taken_and_the_first_replay_does_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Replays:
        def __init__(self, _calls: object) -> None:
            self.times = [900.0, 3.0, 1.0, 2.0]

        def time(self) -> float:
            return self.times.pop(0)

    monkeypatch.setattr(timing, "Captured", Replays)
    assert timing.time_calls([], replays=3) == 2.0
    assert timing.time_calls([], is_rough=True) == 900.0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")
def test_more_work_takes_longer() -> None:
    small, large = (torch.ones(n, n, device="cuda") for n in (64, 4096))
    assert timing.time_calls([lambda: small @ small]) < timing.time_calls([lambda: large @ large])
