"""Predictions beside runs of vLLM: how each line ran is read from its file, of either format."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from leanmoe.cost.constants import shipped
from leanmoe.cost.models import CONFIGS

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from cost_engine import own_times, read_run

BANDS = [
    {"up_to": 2, "rules": [{"top_k": 4}]},
    {"up_to": None, "rules": [{"guaranteed": 3}]},
]


def written(folder: Path, name: str, layers: str = "16", **found: Any) -> Path:
    """A results file of `vllm_gpu.py`; each line has 4 requests but as it says itself."""
    time = {"median": 2.0}
    usual = {"requests": 4, "distinct": 12.0, "activated": 8.0, "step_ms": time, "tpot_ms": time}
    lines = [{**usual, "plan": "stock", **line} for line in found.pop("lines")]
    path = folder / f"{name}-vllm-qwen3-30b-a3b.json"
    settings = {"shape": "qwen3-30b-a3b", "layers": layers, "prompt": "16", "steps": "16"}
    whole = {
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
    assert read_run(new, shipped()).model.shape.layers == 16


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
