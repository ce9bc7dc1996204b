"""When requests are sent: closed loops stay full, Poisson arrivals have their rate."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest

from leanmoe.bench.continuous import Arrivals, Room, run
from leanmoe.bench.metrics import Request
from leanmoe.core.errors import LeanMoeError


@dataclass
class Output:
    request_id: str
    generated_tokens: list[int]
    timestamps: list[float]
    error: str | None = None

    def is_finished(self) -> bool:
        return True


@dataclass
class Manager:
    """A service that takes `seconds` a request, however many are under way."""

    seconds: float = 0.0
    error: str | None = None
    running: bool = True
    sent: list[float] = field(default_factory=list)
    most: int = 0
    waiting: list[tuple[float, str, int]] = field(default_factory=list)

    def add_request(self, _prompt: list[int], max_new_tokens: int, **_: Any) -> str:
        now = time.perf_counter()
        self.sent.append(now)
        self.waiting.append((now + self.seconds, f"r{len(self.sent)}", max_new_tokens))
        self.most = max(self.most, len(self.waiting))
        return self.waiting[-1][1]

    def get_result(self, timeout: float) -> Output | None:
        if not self.waiting:
            time.sleep(timeout)
            return None
        ready, name, tokens = self.waiting[0]
        now = time.perf_counter()
        time.sleep(min(timeout, max(0.0, ready - now)))
        if time.perf_counter() < ready:
            return None
        self.waiting.pop(0)
        stamps = [ready - 0.001 * n for n in range(tokens)][::-1]
        return Output(name, [1] * tokens, stamps, self.error)

    def is_running(self) -> bool:
        return self.running


REQUESTS = [Request((1, 2, 3), 2 + n % 3) for n in range(40)]


def test_a_closed_loop_is_full_and_never_fuller() -> None:
    manager = Manager(0.002)
    timelines = run(manager, REQUESTS, Arrivals(5))
    assert manager.most == 5
    assert [t.output_tokens for t in timelines] == [r.output_tokens for r in REQUESTS]
    assert all(t.input_tokens == 3 and t.delay == 0 for t in timelines)


def test_poisson_arrivals_have_their_rate_and_spread() -> None:
    many = Arrivals.poisson(8.0, 20_000, "seed")
    due = [many.wait(n, 0, 0.0) for n in range(20_000)]
    gaps = [b - a for a, b in pairwise(due)]
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(1 / 8, rel=0.03)
    deviation = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / len(gaps))
    assert deviation == pytest.approx(mean, rel=0.05), "an exponential's deviation is its mean"
    again = Arrivals.poisson(8.0, 20_000, "seed")
    assert again.wait(100, 0, 0.0) == due[100]
    assert Arrivals.poisson(8.0, 20_000, "other").wait(100, 0, 0.0) != due[100]


def test_an_open_loop_sends_at_its_times_whatever_is_under_way() -> None:
    manager = Manager(0.5)
    gaps = [0.0, 0.05, 0.1, 0.02, 0.08]
    timelines = run(manager, REQUESTS[:5], Arrivals(5, gaps))
    found = [b - a for a, b in pairwise(manager.sent)]
    assert found == pytest.approx(gaps[1:], abs=0.03)
    assert manager.most == 5, "none waited for another"
    assert max(t.delay for t in timelines) < 0.03


def test_nothing_is_sent_after_the_time_is_up() -> None:
    manager = Manager(0.02)
    timelines = run(manager, REQUESTS, Arrivals(1), max_seconds=0.1)
    assert 3 <= len(timelines) < 10


def test_failures_are_raised() -> None:
    with pytest.raises(LeanMoeError, match="failed on a request: out of pages"):
        run(Manager(error="Traceback\nout of pages"), REQUESTS, Arrivals(1))
    with pytest.raises(LeanMoeError, match="stopped before"):
        run(Manager(5.0, running=False), REQUESTS, Arrivals(1))


def test_room_takes_whole_prompts_and_a_page_a_request() -> None:
    assert Room(4, 256, 288).page == 512
    assert Room(4, 256, 288).step_tokens == 2048 + 4
    assert Room(4, 300, 320).step_tokens == 1800 + 4
    assert Room(4, 5000, 5100).step_tokens == 2048 + 4
