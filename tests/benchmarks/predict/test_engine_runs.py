"""Predictions beside runs of vLLM: how each line ran is read from its file, of either format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.predict.engine_runs import FULL, own_times, read_layouts, read_run, runs_in
from benchmarks.predict.several_gpus import parallel_steps, summary
from leanmoe.models.catalog import CONFIGS
from leanmoe.predict.constants import shipped

BANDS = [
    {"up_to": 2, "rules": [{"top_k": 4}]},
    {"up_to": None, "rules": [{"guaranteed": 3}]},
]


def written(folder: Path, name: str, layers: str = "16", **found: Any) -> Path:
    """A results file of `vllm/one_gpu.py`; each line has 4 requests but as it says itself."""
    time = {"median": 2.0}
    usual = {"requests": 4, "distinct": 12.0, "activated": 8.0, "step_ms": time, "tpot_ms": time}
    lines = [{**usual, "plan": "stock", **line} for line in found.pop("lines")]
    path = folder / f"{name}-vllm-qwen3-30b-a3b.json"
    settings = {"shape": "qwen3-30b-a3b", "layers": layers, "prompt": "16", "steps": "16"}
    whole = {
        "leanmoe_benchmark": "vllm_gpu",
        "provenance": {"hardware": "NVIDIA H100 80GB HBM3"},
        "settings": settings,
        "config": {**CONFIGS["Qwen/Qwen3-30B-A3B"], "num_hidden_layers": 16},
        "lines": lines,
        **found,
    }
    path.write_text(json.dumps(whole))
    return path


def experts_ms(path: Path) -> list[float]:
    run = read_run(path, shipped())
    return [1e3 * run.parts(line).experts for line in run.lines]


def test_runs_of_steps_are_told_from_other_benchmarks_of_vllm(tmp_path: Path) -> None:
    steps = written(tmp_path, "a", lines=[{}])
    (tmp_path / "a-vllm-check.json").write_text(json.dumps({"leanmoe_benchmark": "vllm_check"}))
    assert runs_in(tmp_path) == [steps]
    committed = runs_in(Path(__file__).parents[3] / "benchmarks" / "results")
    assert committed
    assert all(read_run(path, shipped()).lines for path in committed)


def test_lines_are_predicted_as_they_ran(tmp_path: Path) -> None:
    ways: dict[str, Any] = {
        how: {"experts": "vllm", "small_steps": how, "bands": BANDS}
        for how in ("repeat", "skip", "group", "auto")
    }
    ways["ours"] = {"experts": "leanmoe", "bands": BANDS}
    lines = [{"plan": name, "experts": way["experts"]} for name, way in ways.items()]
    new = written(tmp_path, "new", ways=ways, lines=lines)
    repeat, skip, group, auto, ours = experts_ms(new)
    assert ours < group == auto < 0.7 * skip
    assert skip == repeat  # 4 tokens with 8 of 12 experts each: no slot is skipped
    plans = {"shared": BANDS, "empty plan": [{"up_to": None, "rules": [{}]}]}
    old = written(tmp_path, "old", plans=plans, lines=[{"plan": "shared"}, {"plan": "empty plan"}])
    assert experts_ms(old)[0] == repeat
    assert read_run(new, shipped()).model.layers == 16


def test_the_band_of_a_lines_requests_counts(tmp_path: Path) -> None:
    """At 2 requests k = 4 and nothing is shared: as slot by slot as the full model's slots."""
    ways = {"a": {"experts": "vllm", "small_steps": "group", "bands": BANDS}}
    ways["b"] = {**ways["a"], "bands": [{"up_to": None, "rules": [{"top_k": 4}]}]}
    lines = [
        {"plan": name, "requests": 2, "distinct": 6.0, "activated": 4.0, "experts": "vllm"}
        for name in ways
    ]
    banded, plain = experts_ms(written(tmp_path, "banded", ways=ways, lines=lines))
    assert banded == plain


def test_own_times_come_from_the_run_of_all_layers(tmp_path: Path) -> None:
    def timed(step: float) -> list[dict[str, Any]]:
        return [
            {
                "requests": n,
                "step_ms": {"median": step},
                "tpot_ms": {"median": step + 0.5 + n / 1e3},
            }
            for n in (1, 2, 4, 8, 16)
        ]

    written(tmp_path, "b", "None", plans={}, lines=timed(9.0))
    alone = own_times(shipped(), tmp_path)
    some = written(tmp_path, "a", "16", ways={"stock": {"experts": "vllm"}}, lines=timed(5.0))
    assert own_times(shipped(), tmp_path) == alone
    assert alone["layer_seconds"] > 0
    assert not any(read_run(some, shipped()).is_fitted(line) for line in timed(5.0))
    (tmp_path / "b-vllm-qwen3-30b-a3b.json").unlink()
    with pytest.raises(ValueError, match="unpack"):
        own_times(shipped(), tmp_path)


def spread(folder: Path, **layouts: list[dict[str, Any]]) -> Path:
    """A results file of `vllm/several_gpus.py`; layouts are named with _ for -."""
    time = {"median": 2.0}
    usual = {"requests": 32, "activated": 8.0, "routing": "skewed", "step_ms": time}
    ways = {
        "stock": {"experts": "vllm"},
        "k=4": {"experts": "vllm", "bands": [{"up_to": None, "rules": [{"top_k": 4}]}]},
        "all": {
            "experts": "vllm",
            "company": "all",
            "bands": [{"up_to": None, "rules": [{"guaranteed": 3}]}],
        },
    }
    found = {
        "provenance": {"hardware": "NVIDIA H100 80GB HBM3"},
        "settings": {"shape": "qwen3-30b-a3b", "layers": "16", "prompt": "16", "steps": "8"},
        "config": {**CONFIGS["Qwen/Qwen3-30B-A3B"], "num_hidden_layers": 16},
        "layouts": {
            name.replace("_", "-").removeprefix("on"): {
                "gpus": 2,
                "ways": ways,
                "lines": [{**usual, **line} for line in lines],
            }
            for name, lines in layouts.items()
        },
    }
    path = folder / "some-parallel-qwen3-30b-a3b.json"
    path.write_text(json.dumps(found))
    return path


STOCK = {"plan": "stock", "distinct": 100.0, "most_loaded": 52.0}


def test_every_layout_is_predicted_as_it_lies(tmp_path: Path) -> None:
    """Whole experts on two GPUs: the most loaded one's are read. Cut in two: all, half of each."""
    whole = {**STOCK, "most_loaded": 100.0}
    path = spread(tmp_path, on1=[whole], tp2=[whole], tp2_ep=[STOCK], dp2_ep=[STOCK])
    runs = read_layouts(path, shipped())
    parts = {name: run.parts(run.lines[0]) for name, run in runs.items()}
    assert list(parts) == ["1", "tp2", "tp2-ep", "dp2-ep"]
    assert parts["1"].communication == 0
    assert all(parts[name].experts < 0.7 * parts["1"].experts for name in ("tp2", "tp2-ep"))
    # Gathered tokens are all on each GPU, as with tensor parallelism.
    assert parts["dp2-ep"].experts == parts["tp2-ep"].experts
    assert parts["dp2-ep"].projections == parts["1"].projections > parts["tp2"].projections
    more = spread(tmp_path, tp2_ep=[{**STOCK, "most_loaded": 60.0}])
    (run,) = read_layouts(more, shipped()).values()
    assert run.parts(run.lines[0]).experts > 1.1 * parts["tp2-ep"].experts


def test_what_all_ranks_decide_they_tell_each_other(tmp_path: Path) -> None:
    lines = [{**STOCK, "plan": plan} for plan in ("stock", "all")]
    (run,) = read_layouts(spread(tmp_path, dp2_ep=lines), shipped()).values()
    stock, of_all = (run.parts(line).communication for line in run.lines)
    assert 1e-6 < (of_all - stock) / 16 < 2e-5


def test_steps_and_gains_of_each_layout_stand_beside_each_other(tmp_path: Path) -> None:
    fewer = {"plan": "k=4", "distinct": 75.0, "most_loaded": 40.0, "activated": 4.0}
    fewer |= {"step_ms": {"median": 1.6}}
    path = spread(tmp_path, tp2_ep=[STOCK, fewer], dp2_ep=[fewer])
    stock, plan, alone = parallel_steps(path, shipped())
    assert (stock["layout"], alone["layout"]) == ("tp2-ep", "dp2-ep")
    assert stock["gain_error"] == 0
    assert plan["measured_gain"] == 1.25
    assert plan["predicted_gain"] == pytest.approx(
        stock["predicted_ms"] / plan["predicted_ms"], rel=1e-3
    )
    assert plan["error"] == pytest.approx(plan["predicted_ms"] / 1.6 - 1, rel=1e-2)
    assert alone["gain_error"] is None  # stock was not measured there
    first, second = summary([stock, plan, alone])
    assert first.startswith("qwen3-30b-a3b, 16 layers, tp2-ep: full model")
    assert f"plans {abs(plan['error']):.1%}, worst {abs(plan['error']):.1%} of 1" in first
    assert "full model" not in second
    assert "gains" not in second


def test_committed_runs_of_several_gpus_are_within_what_the_docs_say() -> None:
    """Nothing was fitted to them: the full model's captured step with whole experts on each GPU."""
    results = Path(__file__).parents[3] / "benchmarks/results"
    paths = sorted(results.glob("2026-11-27-2x-*-parallel-qwen3-30b-a3b*.json"))
    rows = [row for path in paths for row in parallel_steps(path, shipped())]
    full = [abs(row["error"]) for row in rows if row["plan"] in FULL and row["layout"] != "1"]
    assert len(full) >= 18
    assert max(full) < 0.09
