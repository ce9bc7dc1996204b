"""Counters that programs share, and powers of two."""

from __future__ import annotations

import pytest
import torch

from leanmoe.core.errors import LeanMoeError
from leanmoe.kernels.triton import state
from leanmoe.kernels.triton.state import power_of_two, zeros_for
from tests.kernels.triton.routed import DEVICE

HERE = torch.device(DEVICE)


def test_each_use_has_zeros_of_its_own_that_are_kept() -> None:
    counters = zeros_for("a test", 8, HERE)
    assert counters.tolist() == [0] * 8
    assert zeros_for("a test", 8, HERE) is counters
    assert zeros_for("another test", 8, HERE) is not counters


def test_a_capture_on_a_stream_of_its_own_takes_zeros_that_were_made_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def on(stream: int, is_captured: bool) -> None:
        monkeypatch.setattr(state, "_stream", lambda _: (stream, is_captured))

    on(1, False)
    eager = zeros_for("captured", 4, HERE)
    monkeypatch.setattr(torch, "zeros", None)  # nothing is made from here on
    on(2, True)
    captured = zeros_for("captured", 4, HERE)
    assert captured is not eager
    assert zeros_for("captured", 4, HERE) is captured
    on(1, False)
    monkeypatch.undo()
    on(1, False)
    assert zeros_for("captured", 4, HERE) is eager


def test_a_capture_that_comes_first_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "_stream", lambda _: (3, True))
    with pytest.raises(LeanMoeError, match="run the step once outside of a capture before"):
        zeros_for("never run", 4, HERE)


@pytest.mark.skipif(DEVICE == "cpu", reason="there are no graphs to capture without a GPU")
def test_what_an_earlier_graph_writes_does_not_reach_the_counters_of_a_later_one() -> None:
    first, second = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    zeros_for("graphs", 1024, HERE)
    with torch.cuda.graph(first):
        passing = torch.ones(1024, dtype=torch.int32, device=HERE) * 7
    del passing
    with torch.cuda.graph(second, first.pool()):
        counters = zeros_for("graphs", 1024, HERE)
        seen = counters + 0
    first.replay()
    second.replay()
    assert int(seen.abs().sum()) == 0


def test_powers_of_two_are_not_below() -> None:
    assert [power_of_two(n) for n in (1, 2, 3, 8, 9)] == [1, 2, 4, 8, 16]
