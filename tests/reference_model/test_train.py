"""Training: it learns, resumes bit for bit, balances experts, and never falls back silently."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from leanmoe.core.errors import LeanMoeError
from leanmoe.models.shape import read_shape
from reference_model.architecture import build
from reference_model.card import summarise_log
from reference_model.train import check_experts, train
from tests.reference_model.conftest import TINY, TINY_SOFTMAX


def test_a_tiny_run_learns_logs_and_exports(tiny_data: Path, tmp_path: Path) -> None:
    trainer = train(tiny_data, tmp_path, TINY, device="cpu")
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0] - 0.05
    assert lines[0]["kernel"] == "aten::_grouped_mm"
    assert lines[-1]["tokens"] == trainer.tokens == TINY.tokens
    summary = summarise_log(lines)
    assert summary["tokens"] == TINY.tokens
    assert len(summary["dev_curve"]) == 3
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_softmax_model_learns_and_is_one_that_tune_reads(
    tiny_data: Path, tmp_path: Path
) -> None:
    train(tiny_data, tmp_path, TINY_SOFTMAX, device="cpu")
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0] - 0.05
    shape = read_shape(str(tmp_path / "model"))
    assert shape.router.scoring == "softmax"
    assert shape.router.normalises
    assert (shape.experts, shape.top_k, shape.router.groups) == (16, 4, 1)
    resumed = train(tiny_data, tmp_path, TINY_SOFTMAX, device="cpu", resume=True)
    assert resumed.tokens == TINY_SOFTMAX.tokens


def test_max_seconds_stops_and_saves(tiny_data: Path, tmp_path: Path) -> None:
    trainer = train(tiny_data, tmp_path, TINY, device="cpu", max_seconds=0.0)
    assert trainer.tokens == 0
    assert (tmp_path / "checkpoint.safetensors").exists()


def test_a_silent_fallback_is_refused() -> None:
    model = build(TINY.model, seed=0)
    model.set_experts_implementation("eager")
    ids = torch.zeros(1, 8, dtype=torch.long)
    with pytest.raises(LeanMoeError, match="ran a loop instead"):
        check_experts(model, ids, "grouped_mm")
    assert check_experts(model, ids, "eager") == "eager loop"
