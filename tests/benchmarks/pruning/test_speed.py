"""Paired ratios of steps."""

from __future__ import annotations

from benchmarks.pruning.speed import Speed, Timed


def test_the_interval_is_of_order_statistics() -> None:
    speed = Speed.of([2.0, 2.2, 1.8, 2.1, 1.9, 40.0], [1.0] * 6)
    assert (speed.median, speed.low, speed.high, speed.rounds) == (2.05, 1.8, 40.0, 6)


def test_speeds_are_those_of_the_same_round() -> None:
    full, half = ("full", "100%"), ("reap", "50%")
    loads = ("prompts", "1", "8", "32")
    rounds = [
        {
            "seconds": [
                [list(full), dict.fromkeys(loads, s)],
                [list(half), dict.fromkeys(loads, s / 2)],
            ]
        }
        for s in (1.0, 3.0, 5.0)
    ]
    timed = Timed.of(rounds, {full: 10, half: 5})
    assert timed.ratio(full, half, "8").low == 2.0
    assert timed.row(half)["bytes"] == 5
    assert timed.row(half)["step_ms"]["1"] == 1500.0
