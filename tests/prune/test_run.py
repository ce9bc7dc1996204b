"""Where the files of a model that is to be pruned lie."""

from __future__ import annotations

from pathlib import Path

from leanmoe.prune.run import checkpoint_folder


def test_a_local_folder_is_its_own_checkpoint(tmp_path: Path) -> None:
    assert checkpoint_folder(str(tmp_path)) == tmp_path
    assert (checkpoint_folder("reference") / "config.json").is_file()
