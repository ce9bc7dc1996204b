"""What a server shows of its routing while a short load is under way; damaged answers too."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from leanmoe.bench.measurement import Timeline
from leanmoe.bench.server_routing import ScrapedStep, read_step, watch
from leanmoe.bench.servers import Server
from leanmoe.bench.sweep import Outcome
from leanmoe.core.errors import LeanMoeError
from leanmoe.serve.metrics import exposition
from tests.bench.mock_server import MockServer, serving

LAYERS = [{"distinct": 30, "activated": 4.5}, None, {"distinct": 8, "activated": 3.5}]


def text(rows: int = 12, **changes: Any) -> str:
    step = {"rows": rows, "band": 0, "up_to": 16, "layers": LAYERS, **changes}
    return exposition("plan.json", "vllm", step, 120)


def test_what_leanmoe_shows_is_read_back() -> None:
    others = 'vllm:requests{model="a"} NaN\n# HELP leanmoe_band nothing\n'
    assert read_step(others + text()) == ScrapedStep(12, "0", "16", 19, 4)
    assert read_step(text(band=None, up_to=None)) == ScrapedStep(12, "full model", "none", 19, 4)
    assert read_step(exposition("p", "vllm", None, None)) is None


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("", "does not show leanmoe's metrics"),
        ("<html>hello</html>", "does not show leanmoe's metrics"),
        (text().replace('experts{layer="0"} 30', 'experts{layer="0"} nan'), "'nan': it must be"),
        (text().replace('experts{layer="0"} 30', 'experts{layer="0"} -3'), "'-3': it must be"),
        (text().replace('experts{layer="0"} 30', 'experts{layer="0"} x'), "'x': it must be"),
        (text().replace('distinct_experts{layer="0"}', 'distinct_experts{layer="9"}'),
         "different layers"),
        (text().replace('{layer="2"}', '{layer="0"}'), "one value for each"),
        (text().replace('{layer="2"}', "{}"), "one value for each"),
        (text(layers=[]), "has no|one value for each|must have"),
        (text().replace("band=", "other="), "one leanmoe_band"),
        (text() + "leanmoe_step_rows 3\n", "one leanmoe_step_rows"),
    ],
)  # fmt: skip
def test_what_cannot_be_true_is_refused(body: str, said: str) -> None:
    with pytest.raises(LeanMoeError, match=said):
        read_step(body)


def watched(mock: MockServer, most_rows: int = 6, requests: int = 12) -> dict[str, Any]:
    """Three requests under way at once, each with eight tokens."""

    def one(number: int) -> Timeline:
        asked = {"prompt": f"words {number}", "max_tokens": 8}
        httpx.post(f"{mock.url}/v1/completions", json=asked).raise_for_status()
        (seen,) = (seen for seen in mock.seen if seen.prompt == asked["prompt"])
        return Timeline(seen.received, tuple(seen.tokens), 2, 8)

    def run() -> Outcome:
        with ThreadPoolExecutor(3) as pool:
            timelines = list(pool.map(one, range(requests)))
        time.sleep(0.3)  # the client takes its time to end: what is shown then is stale
        return Outcome(timelines)

    return watch(Server("one", mock.url, "mock"), run, most_rows)


def decoding(under_way: int) -> bytes:
    """A server that activates ten experts for each request; without any it shows an old step."""
    distinct = 10 * under_way or 999
    return text(2 * under_way or 5, layers=[{"distinct": distinct, "activated": 2.5}] * 2).encode()


def test_steps_are_sampled_while_requests_are_under_way() -> None:
    with serving(ttft=0.05, itl=0.1, metrics=decoding) as mock:
        found = watched(mock, requests=3)
    assert found["samples"] >= 3
    assert 10 <= found["distinct_experts_a_step"] <= 30, "an earlier run's step was taken"
    assert found["distinct_experts_a_step"] == pytest.approx(5 * found["rows_a_step"])
    assert found["experts_a_token"] == 2.5
    assert found["bands"] == [{"band": "0", "up_to": "16", "samples": found["samples"]}]
    assert found["label"] == "measured"


def test_a_step_that_is_always_alike_is_seen() -> None:
    with serving(ttft=0.02, itl=0.02, metrics=lambda _: text(1).encode()) as mock:
        assert watched(mock, requests=2)["rows_a_step"] == 1


def test_steps_with_prompts_are_left_out() -> None:
    with serving(ttft=0.01, itl=0.01, metrics=lambda _: text(2048).encode()) as mock:
        found = watched(mock)
    assert found == {"missing": "no step of at most 6 rows was seen at /metrics"}


def test_a_server_without_the_metrics_is_told_of_and_gets_no_request() -> None:
    with serving() as mock:
        assert watched(mock) == {"missing": "its /metrics gives HTTP 404"}
        assert not mock.seen
    assert "does not answer at /metrics" in watched(mock)["missing"]


def test_metrics_that_end_meanwhile_are_told_of() -> None:
    def broken(under_way: int) -> bytes:
        return b"" if under_way else text().encode()

    with serving(ttft=0.02, itl=0.02, metrics=broken) as mock:
        assert watched(mock) == {"missing": "it does not show leanmoe's metrics at /metrics"}
