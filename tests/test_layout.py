"""Where things lie and what they are called: sizes, names, and a test file for every module."""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

import leanmoe
from leanmoe.core.shapes import LETTERS
from scripts.files_touched import files_touched

ROOT = Path(__file__).parents[1]
SOURCE = Path(leanmoe.__file__).parent
MODULES = [path for path in sorted(SOURCE.rglob("*.py")) if path.name != "__init__.py"]
NAMES = [path.relative_to(SOURCE).as_posix() for path in MODULES]
MOST_LINES, MOST_LINES_OF_ALL, MOST_LINES_OF_HALF = 400, 39_750, 150
ONE_EACH_VERB = {"run.py", "settings.py"}
"""File names that every verb's folder has."""
PROGRAM = "the text of a kernel, which the test of its launcher runs"
COMMAND = "a command of few lines, which tests of its verb's run.py call"
EXCEPTIONS = {
    "__main__.py": "two lines, which tests/cli/test_main.py runs",
    "core/shapes.py": "the alphabet: a table of letters, which this file reads",
    "cli/calibrate.py": COMMAND,
    "cli/eval.py": COMMAND,
    "cli/export.py": COMMAND,
    "cli/study.py": COMMAND,
    "cli/tune.py": COMMAND,
    "kernels/cpu/experts_program.py": PROGRAM,
    "kernels/cpu/gemm.py": PROGRAM,
    "kernels/cpu/llvm_microkernel.py": PROGRAM,
    "kernels/cpu/route_args.py": PROGRAM,
    "kernels/cpu/route_program.py": PROGRAM,
    "kernels/cpu/route_token.py": PROGRAM,
    "kernels/triton/expert_blocks_program.py": PROGRAM,
    "kernels/triton/experts_direct_program.py": PROGRAM,
    "kernels/triton/experts_program.py": PROGRAM,
    "kernels/triton/fp8_program.py": PROGRAM,
    "kernels/triton/product_program.py": PROGRAM,
    "kernels/triton/router_budget_program.py": PROGRAM,
    "kernels/triton/router_program.py": PROGRAM,
    "kernels/triton/router_token_program.py": PROGRAM,
    "kernels/triton/tile_program.py": PROGRAM,
}
"""Modules without a test file of their own, each with the reason."""


def names(tree: ast.AST) -> set[str]:
    """Every name that a file gives to something, or reads."""
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    used |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return used | {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}


def test_every_module_has_its_test_file() -> None:
    tested = {
        name
        for name, path in zip(NAMES, MODULES, strict=True)
        if (ROOT / "tests" / name).with_name(f"test_{path.name}").exists()
    }
    assert set(NAMES) - tested - set(EXCEPTIONS) == set(), "modules without a test file"
    assert set(EXCEPTIONS) - (set(NAMES) - tested) == set(), "exceptions that are none any more"


@pytest.mark.parametrize("path", MODULES, ids=NAMES)
def test_a_file_is_one_idea_of_at_most_400_lines(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MOST_LINES


def test_no_file_name_is_used_more_than_twice() -> None:
    used = Counter(path.name for path in MODULES if path.name not in ONE_EACH_VERB)
    assert not {name: count for name, count in used.items() if count > 2}


def test_no_public_class_name_is_used_twice() -> None:
    used = Counter(
        node.name
        for path in MODULES
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert not {name: count for name, count in used.items() if count > 1}


@pytest.mark.parametrize("path", MODULES, ids=NAMES)
def test_shape_suffixes_spell_the_alphabet(path: Path) -> None:
    suffixes = {
        match.group(1)
        for name in names(ast.parse(path.read_text(encoding="utf-8")))
        if (match := re.fullmatch(r"_?[a-z][a-z0-9_]*_([A-Z][A-Z0-9]*)", name))
    }
    assert {letter for suffix in suffixes for letter in suffix if letter.isalpha()} <= set(LETTERS)


def test_the_package_grows_no_more() -> None:
    """The target is 30,000 lines; the bound is what was reached on the way there."""
    lines = sorted(len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES)
    assert sum(lines) <= MOST_LINES_OF_ALL
    assert lines[len(lines) // 2] <= MOST_LINES_OF_HALF


@pytest.mark.parametrize(
    ("entry", "most"), [("leanmoe.tune.run:tune", 27), ("leanmoe.serve.vllm.plugin:activate", 20)]
)
def test_a_reader_of_the_main_jobs_opens_few_files(entry: str, most: int) -> None:
    assert len(files_touched(entry)) <= most
