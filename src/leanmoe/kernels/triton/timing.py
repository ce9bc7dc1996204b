"""Times on a GPU: calls captured in a graph, replayed, measured with events."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch

Call = Callable[[], object]


@lru_cache(maxsize=1)
def _shared() -> tuple[Any, Any, Any]:
    """One stream and one pool for all graphs: memory of one is given to the next.

    And a graph that does next to nothing: a pool that no graph uses cannot be used again.
    """
    stream, pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
    keeper = torch.cuda.CUDAGraph()
    one = torch.zeros(1, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        keeper.capture_begin(pool)
        one.add_(1)
        keeper.capture_end()
    return stream, pool, keeper


class Captured:
    """The same computation on several inputs in one graph, so that caches do not flatter."""

    def __init__(self, calls: Sequence[Call]) -> None:
        """Runs each call once (compiling, allocating), then captures all."""
        self.count = len(calls)
        stream, pool, _ = _shared()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in calls:
                call()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        # torch.cuda.graph() collects garbage each time: the tuner captures thousands of graphs.
        with torch.cuda.stream(stream):
            self.graph.capture_begin(pool)
            try:
                for call in calls:
                    call()
            finally:
                self.graph.capture_end()

    def time(self) -> float:
        """Microseconds a call in one replay."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self.graph.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e3 / self.count


def time_calls(calls: Sequence[Call], replays: int = 5, is_rough: bool = False) -> float:
    """Median microseconds a call; one replay before does not count, unless it `is_rough`."""
    captured = Captured(calls)
    if is_rough:
        return captured.time()
    captured.time()
    return statistics.median(captured.time() for _ in range(replays))
