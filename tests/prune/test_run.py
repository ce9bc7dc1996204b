"""Where the files of a model that is to be pruned lie, and what ends a run before text is read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from leanmoe.core.errors import LeanMoeError
from leanmoe.models.hf_config import FILE
from leanmoe.prune import run
from leanmoe.prune.run import checkpoint_folder, prune
from leanmoe.prune.settings import PruneSettings
from tests import tiny


def test_a_local_folder_is_its_own_checkpoint(tmp_path: Path) -> None:
    assert checkpoint_folder(str(tmp_path)) == tmp_path
    assert (checkpoint_folder("reference") / "config.json").is_file()


def never(*_: object) -> None:
    raise AssertionError("experts were ranked")


def test_what_cannot_be_written_is_said_before_experts_are_ranked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "_rank", never)
    full, out = tmp_path / "full", tmp_path / "out"
    tiny.build("glm4_moe").save_pretrained(full)
    asked = PruneSettings(str(full), keep="50%")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(LeanMoeError, match="where 1 B are free"):
        prune(asked, out, "test")
    monkeypatch.undo()
    monkeypatch.setattr(run, "_rank", never)
    config = json.loads((full / FILE).read_text())
    config["quantization_config"] = {"ignore": [r"re:.*experts\.3\..*"]}
    (full / FILE).write_text(json.dumps(config))
    with pytest.raises(LeanMoeError, match="cannot be given the experts' new numbers"):
        prune(asked, out, "test")
    assert not out.exists()
