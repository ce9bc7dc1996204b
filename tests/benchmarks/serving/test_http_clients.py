"""What is counted of vLLM's own client."""

from __future__ import annotations

import pytest

from benchmarks.serving.http_clients import TURNAROUND, between_tokens, turnaround_ms


def test_the_turnaround_is_from_a_reply_to_the_next_request_in_its_place() -> None:
    assert turnaround_ms([0.0, 1.1, 2.3], [1.0, 2.0, 3.0], 1) == pytest.approx(200.0)
    assert turnaround_ms([0.0, 0.0], [1.0, 2.0], 2) is None


def test_throughput_is_between_the_first_request_and_the_last_token() -> None:
    found = between_tokens(
        {
            "start_times": [0.0, 2.5], "ttfts": [1.0, 0.5], "itls": [[1.0], [1.0]],
            "total_output_tokens": 4, "total_input_tokens": 20, "completed": 2,
            "max_concurrency": 1,
        }
    )  # fmt: skip
    assert found["output_throughput_between_tokens"] == 1.0
    assert found[TURNAROUND] == pytest.approx(500.0)
