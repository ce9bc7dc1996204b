"""A tiny sweep on a real model in this process, and what a bench refuses before it starts."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from leanmoe.bench.continuous import Room
from leanmoe.bench.in_process import InProcess, cache_bytes, require_memory
from leanmoe.bench.prompts import Supply
from leanmoe.bench.run import Job, busy_machine, run_job
from leanmoe.bench.settings import BenchSettings, Lengths
from leanmoe.core.errors import LeanMoeError
from leanmoe.models.shape import read_shape
from leanmoe.plan import Plan, Rule
from leanmoe.runtime import shape_of
from tests import tiny

TEXT = Path(__file__).parents[2] / "docs"
"""Enough for prompts; the built-in text takes seconds to read."""
SETTINGS = BenchSettings(
    text=str(TEXT),
    concurrency=(1, 3),
    input_len=Lengths(4, 12),
    output_len=Lengths(2, 6),
    repeats=2,
    num_prompts=5,
)


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    rule = Rule(top_k=8, guaranteed=2, keep_weights=True)
    path = tmp_path / "shared.json"
    Plan.uniform(read_shape("reference").fingerprint(), rule).save(path)
    return path


def job(output: Path, *plans: Path, settings: BenchSettings = SETTINGS, **changes: object) -> Job:
    return Job(("reference",), plans, settings, output, "leanmoe bench", **changes)  # type: ignore[arg-type]


def bench(wanted: Job) -> dict[str, Any]:
    return run_job(wanted, lambda *_: None, lambda _: None).to_json()


def test_full_model_and_plan_in_the_same_run(tmp_path: Path, plan: Path) -> None:
    found = bench(job(tmp_path / "out", plan))
    assert found == json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["complete"]
    assert [v["name"] for v in found["variants"]] == ["full", "shared"]
    assert found["variants"][1]["plan"]["bands"][0]["rules"][0]["guaranteed"] == 2
    assert all("leanmoe" in v["experts_implementation"] for v in found["variants"])
    assert found["provenance"]["commit"]
    for entry in found["loads"]:
        for runs in entry["runs"].values():
            assert [run["completed"] for run in runs] == [5, 5]
        full, shared = entry["runs"]["full"][0], entry["runs"]["shared"][0]
        assert full["total_output_tokens"] == shared["total_output_tokens"]
        assert full["total_input_tokens"] == shared["total_input_tokens"]
        assert entry["gain"]["shared"]["output_throughput"]["repeats"] == 2
    alone, decode_batch = (entry["routing"] for entry in found["loads"])
    assert alone["full"]["distinct_experts_a_step"] == 8, "one token a step: prompts are apart"
    assert decode_batch["full"]["experts_a_token"] == 8
    assert (
        decode_batch["shared"]["distinct_experts_a_step"]
        < (decode_batch["full"]["distinct_experts_a_step"])
    )


def test_an_open_loop_in_process(tmp_path: Path) -> None:
    settings = BenchSettings(**{**vars(SETTINGS), "concurrency": (), "request_rate": (50.0,)})
    (entry,) = bench(job(tmp_path, settings=settings))["loads"]
    assert entry["request_rate"] == 50.0
    assert "median_delay_ms" in entry["runs"]["full"][0]


def test_a_busy_machine_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (100.0 * (os.cpu_count() or 1), 0.0, 0.0))
    assert "The machine was busy" in busy_machine()[0]
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    assert busy_machine() == []


def test_any_family_is_served() -> None:
    model = tiny.build("qwen3_moe")
    supply = Supply([n % 60 for n in range(500)], Lengths(4, 8), Lengths(2, 4))
    plans = {"two": Plan.uniform(shape_of(model).fingerprint(), Rule(top_k=2))}
    runner = InProcess(model, "tiny", plans, SETTINGS, supply)
    load = SETTINGS.loads()[1]
    with torch.inference_mode(), runner.at(load) as run_one:
        outcome = run_one("two", load, supply.draw(load, 0), "seed")
        routing = runner.routing(load, run_one)
    assert len(outcome.timelines) == 5
    assert routing["two"]["experts_a_token"] == 2
    assert routing["full"]["experts_a_token"] == 4


def test_a_cache_that_cannot_fit_is_refused() -> None:
    model = tiny.build("qwen3_moe")
    room = Room(4, 60, 64)
    assert cache_bytes(model, room) == 2 * (4 + 4) * 64 * 4 * 4 * 8 * 4
    with pytest.raises(LeanMoeError, match="GB for keys and values"):
        require_memory(model, Room(4096, 1_000_000, 2_000_000))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engine": "sglang"}, "--engine is 'sglang'"),
        ({"targets": ("reference", "other")}, "2 models were given"),
        ({"targets": ("http://127.0.0.1:1", "reference")}, "stands among addresses"),
        ({"allow_remote": True}, "--allow-remote are for the address"),
        ({"gpus": 0}, "--gpus is 0"),
        ({"engine_args": "[1]"}, "--engine-args is '.1.'"),
        ({"engine_args": '{"a": 1}'}, "--engine-args are for --engine vllm"),
        ({"settings": BenchSettings(repeats=0)}, "--repeats is 0"),
        (
            {"engine": "vllm", "settings": BenchSettings(request_rate=(1.0,), concurrency=())},
            "--request-rate with --engine vllm",
        ),
    ],
)
def test_what_does_not_go_together(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    wanted = {
        "targets": ("reference",),
        "plans": (),
        "settings": SETTINGS,
        "output": tmp_path,
        "command": "",
        **changes,
    }
    with pytest.raises(LeanMoeError, match=message):
        bench(Job(**wanted))
    assert not list(tmp_path.iterdir())


def test_plans_are_refused_before_weights_are_read(
    tmp_path: Path, plan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*_: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("leanmoe.runtime.load_model", loaded)
    other = json.loads(plan.read_text())
    other["model"]["experts"] = 128
    foreign = tmp_path / "foreign.json"
    foreign.write_text(json.dumps(other))
    with pytest.raises(LeanMoeError, match=r"plan foreign: .*its experts is 128"):
        bench(job(tmp_path / "out", foreign))
    with pytest.raises(LeanMoeError, match="another variant is called shared"):
        bench(job(tmp_path / "out", plan, plan))
    with pytest.raises(LeanMoeError, match="cannot read plan"):
        bench(job(tmp_path / "out", tmp_path / "absent.json"))
    with pytest.raises(LeanMoeError, match="--plan is for a model in this process"):
        bench(Job(("http://127.0.0.1:1",), (plan,), SETTINGS, tmp_path / "out", ""))
    assert not (tmp_path / "out").exists()


def test_lengths_beyond_the_model_are_refused(tmp_path: Path) -> None:
    settings = BenchSettings(**{**vars(SETTINGS), "input_len": Lengths(5_000, 5_000)})
    with pytest.raises(LeanMoeError, match="reference takes at most"):
        bench(job(tmp_path, settings=settings))


def test_results_are_not_overwritten_unasked(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(LeanMoeError, match="exists: choose another --output"):
        bench(job(tmp_path))
