"""A drawn checkpoint is one that Transformers loads."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from benchmarks.vllm import draw_model


def test_a_tiny_checkpoint_is_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        sys, "argv", ["draw_model", "tiny", str(tmp_path / "drawn"), "--layers", "1"]
    )
    draw_model.main()
    assert torch.get_default_dtype() == torch.float32
    assert AutoConfig.from_pretrained(tmp_path / "drawn").num_hidden_layers == 1
    assert (tmp_path / "drawn" / "tokenizer.json").is_file()
    with pytest.raises(SystemExit, match="is there already"):
        draw_model.main()
