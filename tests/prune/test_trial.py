"""A pruned checkpoint is run once: what cannot run is an error, what cannot be tried is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from leanmoe.core.errors import LeanMoeError
from leanmoe.models.hf_config import FILE
from leanmoe.models.shards import SINGLE
from leanmoe.prune.trial import run_once
from tests import tiny


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny.build("deepseek_v3").save_pretrained(tmp_path)
    return tmp_path


def change(folder: Path, **values: Any) -> None:
    config = json.loads((folder / FILE).read_text())
    (folder / FILE).write_text(json.dumps({**config, **values}))


def test_a_checkpoint_that_runs_is_said_to(folder: Path) -> None:
    assert run_once(folder, 1000) == "It was loaded and run once."


def test_tensors_of_other_sizes_than_the_config_says_do_not_run(folder: Path) -> None:
    change(folder, moe_intermediate_size=24)
    with pytest.raises(LeanMoeError, match="does not run: "):
        run_once(folder, 1000)


def test_a_tensor_that_is_missing_or_no_number_is_an_error(folder: Path) -> None:
    tensors = load_file(folder / SINGLE)
    bad = {**tensors, "model.norm.weight": tensors["model.norm.weight"] * float("nan")}
    save_file(bad, folder / SINGLE, {"format": "pt"})
    with pytest.raises(LeanMoeError, match="not finite numbers"):
        run_once(folder, 1000)
    del bad["model.norm.weight"]
    save_file(bad, folder / SINGLE, {"format": "pt"})
    with pytest.raises(LeanMoeError, match=r"it lacks model\.norm\.weight"):
        run_once(folder, 1000)


def test_what_cannot_be_tried_here_is_said(folder: Path) -> None:
    assert "of memory is free" in run_once(folder, 1 << 60)
    change(folder, quantization_config={"quant_method": "fp8"})
    assert "its weights are quantised" in run_once(folder, 1000)
