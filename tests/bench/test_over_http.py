"""The load over HTTP: what GuideLLM reports against what a server with known latencies did."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from leanmoe.bench.one_block import block
from leanmoe.bench.run import bench as run_bench
from leanmoe.bench.settings import BenchSettings, Lengths
from leanmoe.core.errors import LeanMoeError
from leanmoe.serve.metrics import exposition
from tests.bench.mock_server import MockServer, serving

pytest.importorskip("guidellm", reason="the extra leanmoe[bench] is not installed")

OUTPUT = 12
TTFT, ITL = 0.8, 0.02
LAG = 0.5
"""How late a busy machine may make a client, in seconds; it never makes it early."""


@pytest.fixture(scope="module")
def servers() -> Iterator[tuple[MockServer, MockServer]]:
    with serving(ttft=TTFT, itl=ITL) as full, serving(ttft=TTFT / 16, itl=ITL / 2) as plan:
        yield full, plan


def asked(*targets: str, **changes: Any) -> BenchSettings:
    settings: dict[str, Any] = {
        "targets": targets,
        "tokenizer": "reference",
        "text": str(Path(__file__).parents[2] / "docs"),
        "concurrency": (3,),
        "input_len": Lengths(10, 20),
        "output_len": Lengths(OUTPUT, OUTPUT),
        "repeats": 2,
        "num_prompts": 9,
        "max_seconds": 30.0,
        "goodput": (("ttft", 1e3 * TTFT * 0.9),),
        **changes,
    }
    return BenchSettings(**settings)


def bench(output: Path, *targets: str, **changes: Any) -> dict[str, Any]:
    return run_bench(asked(*targets, **changes), output, "leanmoe bench").to_json()


@pytest.mark.slow
def test_figures_are_what_the_servers_did(
    servers: tuple[MockServer, MockServer], tmp_path: Path
) -> None:
    full, plan = servers
    found = bench(tmp_path, f"full={full.url}", f"plan={plan.url}")
    assert found["complete"]
    (entry,) = found["loads"]
    for name, server in (("full", full), ("plan", plan)):
        timed = server.timed()
        assert len(timed) == 18, "two repeats of nine requests"
        assert len(entry["runs"][name]) == 2
        run = entry["runs"][name][0]
        first = sorted(timed, key=lambda seen: seen.received)[:9]
        assert (run["completed"], run["failed"]) == (9, 0)
        assert run["total_output_tokens"] == 9 * OUTPUT, "tokens without text are tokens"
        assert run["total_input_tokens"] == sum(len(seen.prompt.split()) for seen in first)
        ttft = statistics.mean(seen.tokens[0] - seen.received for seen in first)
        assert 0 <= run["mean_ttft_ms"] / 1e3 - ttft < LAG
        e2el = statistics.mean(seen.tokens[-1] - seen.received for seen in first)
        assert 0 <= run["mean_e2el_ms"] / 1e3 - e2el < LAG
        decoding = run["mean_e2el_ms"] - run["mean_ttft_ms"]
        assert run["mean_tpot_ms"] == pytest.approx(decoding / (OUTPUT - 1), rel=1e-3)
        assert run["mean_itl_ms"] == pytest.approx(run["mean_tpot_ms"], rel=1e-3)
        lasted = max(s.tokens[-1] for s in first) - min(s.received for s in first)
        assert 0 <= run["duration"] - lasted < LAG
        assert run["output_throughput"] == pytest.approx(9 * OUTPUT / run["duration"])
    assert entry["runs"]["full"][0]["request_goodput"] == 0
    good = entry["runs"]["plan"][0]
    assert good["request_goodput"] == pytest.approx(good["request_throughput"])
    assert entry["gain"]["plan"]["output_throughput"]["median"] > 1.4
    prompts = [{seen.prompt for seen in server.timed()} for server in servers]
    assert prompts[0] == prompts[1], "both servers get the same requests"
    assert len(prompts[0]) == 18, "each repeat has prompts of its own"


@pytest.mark.slow
def test_distinct_experts_stand_beside_the_times_where_a_server_shows_them(tmp_path: Path) -> None:
    layers = [{"distinct": 7, "activated": 2.0}, {"distinct": 10, "activated": 3.0}]
    step = {"rows": 2, "band": None, "up_to": None, "layers": layers}
    shown = exposition("plan.json", "vllm", step, None).encode()
    with serving(ttft=0.01) as full, serving(ttft=0.01, metrics=lambda _: shown) as plan:
        targets = (f"full={full.url}", f"plan={plan.url}")
        (entry,) = bench(tmp_path, *targets, concurrency=(2,), repeats=1)["loads"]
        assert len(full.timed()) == 9
        assert len(plan.timed()) > 9
    assert entry["routing"]["plan"]["distinct_experts_a_step"] == 8.5
    assert entry["routing"]["plan"]["experts_a_token"] == 2.5
    assert entry["routing"]["full"] == {"missing": "its /metrics gives HTTP 404"}
    assert entry["runs"]["plan"][0]["completed"] == 9, "what is watched is not timed"
    (line,) = [
        line for line in block(entry, 0.95).splitlines() if line.startswith("Distinct experts")
    ]
    assert line.split()[-2:] == ["-", "8.50"]
    assert "full: distinct experts are not to be seen: its /metrics gives HTTP 404." in block(
        entry, 0.95
    )


@pytest.mark.slow
def test_replies_shorter_than_asked_for_are_counted_as_they_came(tmp_path: Path) -> None:
    with (
        serving(ttft=0.01, itl=0.001) as full,
        serving(ttft=0.01, itl=0.001, most_tokens=5, has_usage=False) as plan,
    ):
        targets = (f"full={full.url}", f"plan={plan.url}")
        (entry,) = bench(tmp_path, *targets, concurrency=(2,))["loads"]
    for run in entry["runs"]["plan"]:
        assert (run["total_output_tokens"], run["short_replies"]) == (9 * 5, 9)
    assert entry["runs"]["full"][0]["short_replies"] == 0
    assert entry["gain"] == {}
    shown = block(entry, 0.95)
    assert "plan: 18 of 18 replies were shorter than asked for; what came is counted." in shown
    assert "plan over full: replies have other lengths, so no gain is claimed." in shown


@pytest.mark.slow
@pytest.mark.parametrize("most_tokens", [0, None])
def test_a_servers_own_reason_is_shown(tmp_path: Path, most_tokens: int | None) -> None:
    """As HTTP 400, and as an error in the stream."""
    reason = "extra fields not permitted: ignore_eos"
    with (
        serving(error=reason, most_tokens=most_tokens) as server,
        pytest.raises(LeanMoeError, match=f"refuses the load at .*{reason}"),
    ):
        bench(tmp_path, f"full={server.url}")


@pytest.mark.slow
def test_a_servers_key_comes_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(ttft=0.01, itl=0.001, key="secret") as server:
        with pytest.raises(LeanMoeError, match=r"HTTP 401 \(Unauthorized\); set OPENAI_API_KEY"):
            bench(tmp_path / "without", f"full={server.url}")
        monkeypatch.setenv("OPENAI_API_KEY", "secret")
        found = bench(tmp_path, f"full={server.url}", repeats=1, concurrency=(1,))
    assert found["loads"][0]["runs"]["full"][0]["completed"] == 9
    assert "secret" not in (tmp_path / "results.json").read_text()


@pytest.mark.slow
def test_an_open_loop_arrives_at_its_rate(tmp_path: Path) -> None:
    with serving(ttft=0.01, itl=0.001) as server:
        open_loop = {"concurrency": (), "request_rate": (20.0,)}
        (entry,) = bench(tmp_path, server.url, **open_loop, num_prompts=60, repeats=1)["loads"]
        received = sorted(seen.received for seen in server.timed())
    (run,) = entry["runs"][next(iter(entry["runs"]))]
    assert len(received) == 60
    # Of 59 exponential gaps the mean has a standard error of 13%. A client that a busy machine
    # starts late sends its first requests at once, and says how late they were.
    late = LAG + run["p99_delay_ms"] / 1e3
    assert 59 / (20 * 1.6) - late < received[-1] - received[0] < 59 / (20 * 0.6) + late
    gaps = [b - a for a, b in pairwise(received)]
    assert statistics.stdev(gaps) > 0.5 * statistics.mean(gaps), "not evenly spaced"


@pytest.mark.slow
def test_a_server_that_dies_leaves_what_was_measured(tmp_path: Path) -> None:
    with serving(ttft=0.01, itl=0.001, dies_after=30) as server:
        wanted = asked(server.url, concurrency=(1, 2, 4), num_prompts=8, repeats=2)
        written: list[bool] = []
        path = tmp_path / "results.json"
        with pytest.raises(LeanMoeError, match=r"stopped answering at .* marked incomplete"):
            run_bench(wanted, tmp_path, "", closed=lambda: written.append(path.exists()))
    stored = json.loads((tmp_path / "results.json").read_text())
    assert written == [True]
    assert stored["complete"] is False
    assert "stopped answering" in stored["stopped"]
    assert stored["loads"][0]["max_concurrency"] == 1
    (runs,) = stored["loads"][0]["runs"].values()
    assert [run["completed"] for run in runs] == [8, 8]


def test_a_server_without_room_for_the_lengths_is_refused(
    servers: tuple[MockServer, MockServer], tmp_path: Path
) -> None:
    with pytest.raises(LeanMoeError, match="takes at most 4,096"):
        bench(tmp_path, servers[0].url, input_len=Lengths(4096, 4096))
    assert not (tmp_path / "results.json").exists()
