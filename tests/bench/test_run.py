"""A tiny sweep on a real model in this process, and what a bench refuses before it starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from leanmoe.bench.run import bench as run_bench
from leanmoe.bench.settings import BenchSettings, Lengths
from leanmoe.core.errors import LeanMoeError
from leanmoe.models.shape import read_shape
from leanmoe.plan import Plan, Rule
from leanmoe.results.bench import BenchResults

TEXT = Path(__file__).parents[2] / "docs" / "guide"
"""Enough for prompts; the built-in text takes seconds to read."""
SETTINGS: dict[str, Any] = {
    "targets": ("reference",),
    "text": str(TEXT),
    "concurrency": (1, 3),
    "input_len": Lengths(4, 12),
    "output_len": Lengths(2, 6),
    "repeats": 2,
    "num_prompts": 5,
}


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    rule = Rule(top_k=8, guaranteed=2, renormalise=0.0)
    path = tmp_path / "shared.json"
    Plan.uniform(read_shape("reference").fingerprint(), rule).save(path)
    return path


def bench(output: Path, **changes: Any) -> dict[str, Any]:
    return run_bench(BenchSettings(**{**SETTINGS, **changes}), output, "leanmoe bench").to_json()


def test_full_model_and_plan_in_the_same_run(tmp_path: Path, plan: Path) -> None:
    found = bench(tmp_path / "out", plan=(plan,))
    stored = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found == BenchResults.from_json(stored).to_json()
    assert found["complete"]
    assert [v["name"] for v in found["variants"]] == ["full", "shared"]
    assert found["variants"][1]["plan"]["levels"][0]["bands"][0]["rules"][0]["guaranteed"] == 2
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
    (entry,) = bench(tmp_path, concurrency=(), request_rate=(50.0,))["loads"]
    assert entry["request_rate"] == 50.0
    assert "median_delay_ms" in entry["runs"]["full"][0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engine": "sglang"}, "--engine is 'sglang'"),
        ({"targets": ("reference", "other")}, "2 models were given"),
        ({"targets": ("http://127.0.0.1:1", "reference")}, "stands among addresses"),
        ({"allow_remote": True}, "--allow-remote are for the address"),
        ({"gpus": 0}, "--gpus is 0"),
        ({"engine_args": ("--enforce-eager",)}, "--engine-args are for --engine vllm"),
        ({"repeats": 0}, "--repeats is 0"),
    ],
)
def test_what_does_not_go_together(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(LeanMoeError, match=message):
        bench(tmp_path, **changes)
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
        bench(tmp_path / "out", plan=(foreign,))
    with pytest.raises(LeanMoeError, match="another variant is called shared"):
        bench(tmp_path / "out", plan=(plan, plan))
    with pytest.raises(LeanMoeError, match="cannot read plan"):
        bench(tmp_path / "out", plan=(tmp_path / "absent.json",))
    with pytest.raises(LeanMoeError, match="--plan is for a model in this process"):
        bench(tmp_path / "out", targets=("http://127.0.0.1:1",), plan=(plan,))
    assert not (tmp_path / "out").exists()


def test_lengths_beyond_the_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LeanMoeError, match="reference takes at most"):
        bench(tmp_path, input_len=Lengths(5_000, 5_000))


def test_results_are_not_overwritten_unasked(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(LeanMoeError, match="exists: choose another --output"):
        bench(tmp_path)
