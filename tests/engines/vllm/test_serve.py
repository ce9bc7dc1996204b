"""`leanmoe serve` with vLLM: the plugin found by its entry point, a reply, the plan in /metrics."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

from leanmoe.models.reference import path
from leanmoe.models.shape import read_shape
from leanmoe.plan import Band, Level, Plan, Rule

MODEL = read_shape("reference").fingerprint()
PLAN = Plan.banded(MODEL, (Band(8, (Rule(guaranteed=3),) * 6), Band(None, (Rule(top_k=6),) * 6)))
PATIENCE = 240
"""Seconds until a server on two busy cores must answer."""


def fetch(url: str, data: Any = None, **headers: str) -> str:
    body = None if data is None else json.dumps(data).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json", **headers})
    with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
        return str(answer.read().decode())


@pytest.fixture(scope="module", params=["vllm", "transformers"])
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, str]]:
    """The address of a server under the plan, and its engine; it ends with the tests of it."""
    folder = tmp_path_factory.mktemp(request.param)
    PLAN.save(folder / "plan.json")
    words = ["--plan", str(folder / "plan.json"), "--engine", request.param]
    with running(folder, words) as url:
        yield url, request.param
        if request.param == "vllm":
            assert "6 of 6 MoE layers under it" in (folder / "log.txt").read_text()


@contextmanager
def running(folder: Path, words: list[str], **variables: str) -> Iterator[str]:
    """The address of `leanmoe serve reference` with these words, inside the `with`."""
    if not {"leanmoe", "leanmoe_control"} <= entry_points(group="vllm.general_plugins").names:
        pytest.skip("leanmoe is not installed here, so vLLM does not find it: make test-engines")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "leanmoe", "serve", "reference", "--port", str(port), *words]
    if "transformers" not in words:
        command += ["--", "--enforce-eager", "--max-model-len", "256", "--dtype", "float32"]
    environment = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    log = folder / "log.txt"
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment | variables)
    url = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + PATIENCE
        while True:
            assert process.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < end, log.read_text()[-4000:]
            try:
                fetch(f"{url}/health")
                break
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        process.wait(timeout=60)


def test_a_server_answers_and_says_what_the_plan_does(server: tuple[str, str]) -> None:
    url, engine = server
    (model,) = json.loads(fetch(f"{url}/v1/models"))["data"]
    assert model["id"] == "reference"
    assert model["root"] == str(path())
    question = {
        "model": model["id"], "prompt": "The river flows through", "max_tokens": 8,
        "temperature": 0, "ignore_eos": True,
    }  # fmt: skip
    fetch(f"{url}/metrics")
    reply = json.loads(fetch(f"{url}/v1/completions", question))
    assert reply["choices"][0]["text"].strip()
    metrics = fetch(f"{url}/metrics")
    assert f'engine="{engine}"' in metrics
    assert 'leanmoe_band{band="0",up_to="8"} 1' in metrics
    assert 'leanmoe_distinct_experts{layer="5"}' in metrics
    # A step of one token has only its own three guaranteed experts to choose from.
    assert "leanmoe_step_rows 1\n" in metrics
    assert 'leanmoe_activated_experts{layer="0"} 3' in metrics
    assert 'leanmoe_distinct_experts{layer="0"} 3' in metrics
    if engine == "vllm":
        assert "vllm:generation_tokens_total" in metrics


def test_a_bench_measures_it_over_http(server: tuple[str, str], tmp_path: Path) -> None:
    pytest.importorskip("guidellm", reason="the extra leanmoe[bench] is not installed")
    url, engine = server
    load = ("--request-rate", "4") if engine == "vllm" else ("--concurrency", "2")
    command = [
        sys.executable, "-m", "leanmoe", "bench", f"plan={url}", *load, "--num-prompts", "4",
        "--repeats", "1", "--input-len", "24", "--output-len", "6",
        "--output", str(tmp_path / "bench"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Serving Benchmark Result" in done.stdout
    assert (tmp_path / "bench" / "report.html").stat().st_size > 10_000
    found = json.loads((tmp_path / "bench" / "results.json").read_text())
    assert found["complete"]
    (run,) = found["loads"][0]["runs"]["plan"]
    assert (run["completed"], run["failed"]) == (4, 0)
    assert run["total_output_tokens"] == 4 * 6, "no reply ends early"
    assert run["total_input_tokens"] == 4 * 24
    assert 0 < run["median_ttft_ms"] <= run["median_e2el_ms"]
    assert run["output_throughput"] == pytest.approx(24 / run["duration"], rel=0.01)
    seen = found["loads"][0]["routing"]["plan"]
    assert seen["samples"] > 0, seen
    assert {band["band"] for band in seen["bands"]} == {"0"}, "a step with a prompt was taken"
    # Each token keeps its best three, and of its others those that are active anyway.
    assert 3 <= seen["experts_a_token"] <= MODEL.top_k
    most = 3 * seen["rows_a_step"]
    distinct, rounding = seen["distinct_experts_a_step"], 1e-9
    assert seen["experts_a_token"] <= distinct + rounding <= most + 2 * rounding
    assert "Distinct experts a step:" in done.stdout


def refusal(url: str, data: Any, **headers: str) -> tuple[int, str]:
    with pytest.raises(urllib.error.HTTPError) as error:
        fetch(url, data, **headers)
    return error.value.code, error.value.read().decode()


def test_tiers_load_and_a_change_of_plan_over_http(tmp_path: Path) -> None:
    for name, most in (("a", 6), ("b", 4)):
        levels = (("careful", most), ("fast", most - 2))
        bands = [(one, (Band(None, (Rule(top_k=k),) * 6),)) for one, k in levels]
        Plan(MODEL, tuple(Level(one, rules) for one, rules in bands)).save(
            tmp_path / f"{name}.json"
        )
    words = ["--plan", f"{tmp_path / 'a.json'},{tmp_path / 'b.json'}", "--slo", "tpot=1us"]
    with running(tmp_path, [*words, "--engine", "vllm"], LEANMOE_PLAN_KEY="secret") as url:
        question: dict[str, Any] = {
            "model": "reference", "prompt": "The river flows through", "max_tokens": 8,
            "temperature": 0, "ignore_eos": True,
        }  # fmt: skip
        for tier in (None, "strict", "fast"):
            asked = {} if tier is None else {"vllm_xargs": {"leanmoe_tier": tier}}
            reply = json.loads(fetch(f"{url}/v1/completions", question | asked))
            assert reply["choices"][0]["text"].strip()
        unknown = question | {"vllm_xargs": {"leanmoe_tier": "economy"}}
        code, said = refusal(f"{url}/v1/completions", unknown)
        assert code == 400
        assert "it must be one of strict, full, careful, fast" in said
        assert refusal(f"{url}/leanmoe/plan", {"plan": "b"})[0] == 401
        key = {"Authorization": "Bearer secret"}
        assert refusal(f"{url}/leanmoe/plan", {"plan": "c"}, **key)[0] == 400
        assert json.loads(fetch(f"{url}/leanmoe/plan", {"plan": "b"}, **key))["epoch"] == 1
        fetch(f"{url}/v1/completions", question)
        metrics = fetch(f"{url}/metrics")
    assert 'leanmoe_level{level="fast",plan="b"} 1' in metrics, "no step takes a microsecond"
    assert 'leanmoe_reply_tokens_total{tier="careful"} 16' in metrics
    assert 'leanmoe_reply_tokens_total{tier="strict"} 8' in metrics
    assert 'leanmoe_degraded_tokens_total{tier="careful"}' in metrics
    assert 'leanmoe_degraded_tokens_total{tier="strict"}' not in metrics
    assert 'leanmoe_activated_experts{layer="0"} 2' in metrics, "the fast level of plan b"
    assert "level careful -> fast: tpot is at" in (tmp_path / "log.txt").read_text()
