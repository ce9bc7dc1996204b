"""Interleaved runs: who takes part in which repeat, and when there have been enough."""

from __future__ import annotations

import os
import random

import pytest

from leanmoe.bench.comparison import busy_machine, interleaved


def test_every_repeat_runs_each_variant_that_still_takes_part() -> None:
    order = list(interleaved({"full": 8, "plan": 8, "stock": 2}, random.Random(0)))
    for repeat in range(8):
        names = sorted(name for number, name in order if number == repeat)
        assert names == ["full", "plan", "stock"][: 3 if repeat < 2 else 2]
    assert [number for number, _ in order] == sorted(number for number, _ in order)
    firsts = {next(n for r, n in order if r == repeat) for repeat in range(8)}
    assert len(firsts) > 1, "one order for all repeats favours whoever comes first"


def test_repeats_end_when_there_have_been_enough() -> None:
    asked: list[int] = []

    def are_enough(repeats: int) -> bool:
        asked.append(repeats)
        return repeats == 3

    order = list(interleaved({"full": 8, "plan": 8}, random.Random(0), are_enough))
    assert [repeat for repeat, _ in order] == [0, 0, 1, 1, 2, 2]
    assert asked == [1, 2, 3]


def test_a_busy_machine_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr("psutil.cpu_percent", lambda interval: 50.0)  # noqa: ARG005
    noted = busy_machine("before it began")
    assert noted is not None
    assert "took 2.0 of this machine's 4 cores before it began" in noted
    monkeypatch.setattr("psutil.cpu_percent", lambda interval: 5.0)  # noqa: ARG005
    assert busy_machine("before it began") is None
