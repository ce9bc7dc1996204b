"""Every benchmark imports and says what it takes on a machine without a GPU."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from pathlib import Path

import pytest

import benchmarks

FOLDER = Path(benchmarks.__file__).parent
MODULES = [
    ".".join(("benchmarks", *path.relative_to(FOLDER).with_suffix("").parts))
    for path in sorted(FOLDER.rglob("*.py"))
    if path.name != "__init__.py"
]
STARTED = {"benchmarks.pruning.memory"}
"""What another module starts in a process of its own: it takes no options."""
ENTRY = 'if __name__ == "__main__"'
PROGRAMS = [
    name
    for name in MODULES
    if name not in STARTED
    and ENTRY in (FOLDER.parent / (name.replace(".", "/") + ".py")).read_text(encoding="utf-8")
]


@pytest.mark.parametrize("name", MODULES)
def test_a_benchmark_imports_without_a_gpu(name: str) -> None:
    assert import_module(name).__doc__


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_benchmark_has_help(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as end:
        import_module(name).main()
    assert end.value.code == 0
    assert "--help" in capsys.readouterr().out


def test_the_table_of_the_readme_names_every_program() -> None:
    table = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert not [name for name in PROGRAMS if f"python -m {name}" not in table]
