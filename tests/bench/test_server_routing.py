"""What a server shows of its routing while a short load is under way; damaged answers too."""

from __future__ import annotations

from typing import Any

import pytest

from leanmoe.bench.server_routing import SAMPLES, ScrapedStep, read_step, watch
from leanmoe.bench.servers import Server
from leanmoe.bench.settings import ServiceLoad
from leanmoe.core.errors import LeanMoeError
from leanmoe.serve.metrics import exposition
from tests.bench.mock_server import MockServer, serving

pytest.importorskip("httpx", reason="the extra leanmoe[bench] is not installed")

LAYERS = [{"distinct": 30, "activated": 4.5}, None, {"distinct": 8, "activated": 3.5}]


def text(rows: int = 12, **changes: Any) -> str:
    step = {"rows": rows, "band": 0, "up_to": 16, "layers": LAYERS, **changes}
    return exposition("plan.json", "vllm", step, 120.0)


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


def watched(mock: MockServer, load: ServiceLoad, most_rows: int = 6) -> dict[str, Any]:
    rows = [{"prompt": f"words {n}", "output_tokens_count": 8} for n in range(40)]
    return watch(Server("one", mock.url, "mock"), load, rows, 3, most_rows, 10.0)


def decoding(under_way: int) -> bytes:
    """A server that activates ten experts for each request; without any it shows an old step."""
    distinct = 10 * under_way or 999
    return text(2 * under_way or 5, layers=[{"distinct": distinct, "activated": 2.5}] * 2).encode()


def test_steps_are_sampled_while_requests_are_under_way() -> None:
    with serving(ttft=0.02, itl=0.02, metrics=decoding) as mock:
        found = watched(mock, ServiceLoad(40, concurrency=3))
    assert found["samples"] == SAMPLES
    assert 10 <= found["distinct_experts_a_step"] <= 30, "an earlier run's step was taken"
    assert found["distinct_experts_a_step"] == pytest.approx(5 * found["rows_a_step"])
    assert found["experts_a_token"] == 2.5
    assert found["bands"] == [{"band": "0", "up_to": "16", "samples": SAMPLES}]
    assert found["label"] == "measured"
    assert len(mock.seen) < 40, "requests go on although there are enough samples"
    assert mock.under_way == 0, "a request is left to disturb the next run"


def test_an_open_loop_is_watched_at_its_rate() -> None:
    with serving(ttft=0.01, itl=0.02, metrics=decoding) as mock:
        found = watched(mock, ServiceLoad(40, rate=10.0))
    assert 10 <= found["distinct_experts_a_step"] <= 30
    assert found["samples"] <= SAMPLES


def test_a_single_request_at_once_is_seen_though_every_step_is_alike() -> None:
    def alike(_under_way: int) -> bytes:
        return text(1).encode()

    with serving(ttft=0.01, itl=0.01, metrics=alike) as mock:
        assert watched(mock, ServiceLoad(40, concurrency=1))["rows_a_step"] == 1


def test_steps_with_prompts_are_left_out() -> None:
    with serving(ttft=0.01, itl=0.01, metrics=lambda _: text(2048).encode()) as mock:
        found = watched(mock, ServiceLoad(40, concurrency=3))
    assert found == {"missing": "no step of at most 6 rows was seen at /metrics"}


def test_a_server_without_the_metrics_is_told_of_and_gets_no_request() -> None:
    with serving() as mock:
        found = watched(mock, ServiceLoad(40, concurrency=3))
        assert found == {"missing": "its /metrics gives HTTP 404"}
        assert not mock.seen
    assert "does not answer at /metrics" in watched(mock, ServiceLoad(9, concurrency=3))["missing"]


def test_a_server_that_dies_meanwhile_is_told_of() -> None:
    with serving(metrics=decoding, dies_after=1) as mock:
        found = watched(mock, ServiceLoad(40, concurrency=3))
    assert list(found) == ["missing"]
