"""Training windows in their order, and dev batches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from leanmoe.core.errors import LeanMoeError
from reference_model.stream import Windows, dev_batches, load_stream


def test_every_epoch_covers_the_stream_once_and_differently() -> None:
    ids = torch.arange(1 + 10 * 8)
    windows = Windows(ids, length=8, seed=0)
    epochs = []
    for epoch in range(2):
        inputs, targets = windows.batch(epoch * windows.per_epoch, windows.per_epoch)
        assert torch.equal(inputs + 1, targets)
        assert inputs.flatten().unique().numel() == inputs.numel()
        epochs.append(inputs)
    assert not torch.equal(epochs[0], epochs[1])
    again, _ = Windows(ids, length=8, seed=0).batch(0, windows.per_epoch)
    assert torch.equal(again, epochs[0])


def test_dev_batches_are_whole_and_in_order() -> None:
    batches = dev_batches(torch.arange(8 * 5 + 3), length=8, count=2)
    assert [inputs.shape for inputs, _ in batches] == [(2, 8), (2, 8)]
    assert batches[1][1][0].tolist() == list(range(17, 25))


def test_a_stream_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    device = torch.device("cpu")
    with pytest.raises(LeanMoeError, match=r"make them with python -m reference_model\.prepare"):
        load_stream(tmp_path / "train.bin", 64, device)
    np.array([1, 64], dtype="<u2").tofile(tmp_path / "train.bin")
    with pytest.raises(LeanMoeError, match="holds id 64; the model's vocab_size is 64"):
        load_stream(tmp_path / "train.bin", 64, device)
    with pytest.raises(LeanMoeError, match="windows of 8 need 17"):
        Windows(torch.arange(12), length=8, seed=0)
