"""A run goes on from its checkpoint bit for bit, and from no other's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from leanmoe.core.errors import LeanMoeError
from reference_model.architecture import correction_bias, routers
from reference_model.train import Trainer
from tests.reference_model.conftest import TINY


def test_a_resumed_run_equals_an_unbroken_one(tiny_data: Path, tmp_path: Path) -> None:
    settings = replace(TINY, residual_dropout=0.1)
    # Dropout draws from the global generator, which building a model seeds.
    whole = Trainer(tiny_data, tmp_path / "whole", settings, "cpu")
    for _ in range(8):
        whole.train_step()
    first = Trainer(tiny_data, tmp_path / "parts", settings, "cpu")
    for _ in range(3):
        first.train_step()
    first.save(seconds=1.0)
    second = Trainer(tiny_data, tmp_path / "parts", settings, "cpu")
    second.resume(tmp_path / "parts" / "checkpoint.safetensors")
    for _ in range(5):
        second.train_step()
    assert second.step == whole.step
    for mine, other in zip(second.adam.masters, whole.adam.masters, strict=True):
        assert torch.equal(mine, other)
    for mine_gate, other_gate in zip(routers(second.model), routers(whole.model), strict=True):
        assert torch.equal(correction_bias(mine_gate), correction_bias(other_gate))


def test_a_checkpoint_of_another_model_or_data_is_refused(tiny_data: Path, tmp_path: Path) -> None:
    trainer = Trainer(tiny_data, tmp_path, TINY, "cpu")
    trainer.train_step()
    trainer.save(seconds=1.0)
    file = tmp_path / "checkpoint.safetensors"
    other_model = replace(TINY, model=replace(TINY.model, expert_intermediate=32))
    with pytest.raises(LeanMoeError, match="expert_intermediate"):
        Trainer(tiny_data, tmp_path, other_model, "cpu").resume(file)
    trainer.data_sha256 = "another"
    with pytest.raises(LeanMoeError, match="other data"):
        trainer.resume(file)
    file.write_bytes(b"not a checkpoint")
    with pytest.raises(LeanMoeError, match="cannot read checkpoint"):
        trainer.resume(file)
