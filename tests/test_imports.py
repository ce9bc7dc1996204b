"""Who may import whom, read from the source, and what is loaded when little is asked for."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import leanmoe

SOURCE = Path(leanmoe.__file__).parent
BASE = {"errors", "storage", "provenance", "progress", "text"}
"""Modules that anything may import."""
SHAPES = {"config", "families", "mixers", "placement", "plan", "quantisation", "routers", "shape"}
"""What a model is and what a plan says: plain Python."""
ALLOWED: dict[str, set[str]] = {
    **{name: set() for name in BASE},
    **{name: SHAPES | {"reference"} for name in SHAPES},
    "routing": SHAPES,
    "kernels": SHAPES,
    "cost": SHAPES,
    "runtime": SHAPES | {"routing", "kernels", "reference"},
    "profile": SHAPES | {"routing", "runtime", "quality"},
    "quality": SHAPES | {"runtime"},
    "load": SHAPES | {"runtime", "reference"},
    "prune": SHAPES | {"runtime"},
    "tune": SHAPES | {"routing", "cost", "profile"},
    "engines": SHAPES | {"routing", "kernels", "runtime", "reference"},
    "report": set(),
    "reference": SHAPES | {"routing", "runtime", "quality", "report"},
}
"""What each part may import of leanmoe, itself and `BASE` aside. `cli` and `job` import all."""
MEASURES = {"runtime", "quality"}
MEASURING = {"tune/layer_time.py", "tune/perturbation.py", "tune/sensitivity.py"}
"""Files of the search that measure on a model, and so import `MEASURES` too; no others may."""
EVERYTHING = {"cli", "job", "__init__", "__main__"}
HEAVY = (
    "torch",
    "transformers",
    "numba",
    "scipy",
    "plotly",
    "datasets",
    "vllm",
    "triton",
    "guidellm",
)
TABLES = ("pyarrow", "pandas", "aiconfigurator_core")
"""Packages of leanmoe[predict]: read where they are installed, never needed."""


def part(path: Path) -> str:
    """The part of leanmoe a source file belongs to: a folder, or a module at the top."""
    relative = path.relative_to(SOURCE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imported(tree: ast.AST, package: str) -> set[str]:
    """Absolute names of all modules a tree imports, wherever in it the import stands."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*(parents if node.level else []), node.module or ""]).strip(".")
            names.add(base)
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def parts_imported(path: Path) -> set[str]:
    """The parts of leanmoe a source file imports, its own and the base modules aside."""
    package = ".".join(["leanmoe", *path.relative_to(SOURCE).parts[:-1]])
    names = imported(ast.parse(path.read_text(encoding="utf-8")), package)
    parts = {name.split(".")[1] for name in names if name.startswith("leanmoe.")}
    known = {part(file) for file in SOURCE.rglob("*.py")}
    return (parts & known) - BASE - {part(path)}


FILES = sorted(SOURCE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=[str(p.relative_to(SOURCE)) for p in FILES])
def test_parts_import_only_what_the_design_allows(path: Path) -> None:
    name = part(path)
    if name in EVERYTHING:
        return
    assert name in ALLOWED, f"{name} is a new part: say in this test what it may import"
    measuring = path.relative_to(SOURCE).as_posix() in MEASURING
    assert parts_imported(path) <= ALLOWED[name] | (MEASURES if measuring else set())


def test_the_rules_can_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "routing").mkdir()
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "cpu.py").write_text("")
    guilty = tmp_path / "routing" / "route.py"
    monkeypatch.setattr(sys.modules[__name__], "SOURCE", tmp_path)
    for text in (
        "from leanmoe.kernels.cpu import run",
        "import leanmoe.kernels",
        "from leanmoe import kernels",
        "from ..kernels import cpu",
        "def late():\n    from leanmoe.kernels import cpu",
    ):
        guilty.write_text(text)
        assert parts_imported(guilty) == {"kernels"}, text
    guilty.write_text("import torch\nfrom leanmoe.routing.select import x\n")
    assert parts_imported(guilty) == set()


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_shapes_and_plans_need_no_heavy_package(name: str) -> None:
    tree = ast.parse((SOURCE / f"{name}.py").read_text(encoding="utf-8"))
    assert not {module.split(".")[0] for module in imported(tree, "leanmoe")} & set(HEAVY)


def test_kernels_and_routing_never_import_transformers() -> None:
    for folder in ("kernels", "routing"):
        for path in (SOURCE / folder).rglob("*.py"):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            found = {name.split(".")[0] for name in imported(tree, "leanmoe")}
            assert "transformers" not in found, path


def test_cost_imports_heavy_packages_only_where_it_fits_or_reads_tables() -> None:
    allowed = {"fit.py": {"scipy"}, "tables.py": {"pyarrow"}}
    for path in (SOURCE / "cost").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found = {name.split(".")[0] for name in imported(tree, "leanmoe.cost")}
        assert found & {*HEAVY, *TABLES} <= allowed.get(path.name, set()), path


def loaded(code: str) -> set[str]:
    """Which heavy packages a fresh interpreter holds after running `code`."""
    script = (
        f"import sys\ntry:\n    {code}\nexcept SystemExit as end:\n    assert not end.code\n"
        f"print('LOADED', *set(sys.modules) & set({HEAVY!r}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    return set(done.stdout.splitlines()[-1].split()[1:])


@pytest.mark.parametrize(
    "code",
    [
        "import leanmoe",
        "import leanmoe.plan, leanmoe.shape",
        "from leanmoe.cli import main; main(['--help'])",
        "from leanmoe.cli import main; main(['inspect', 'reference'])",
        "import leanmoe.cost.predict, leanmoe.cost.sweep, leanmoe.cost.study",
        "from leanmoe.cli import main; main(['predict', 'reference', '--concurrency', '1'])",
    ],
)
def test_little_is_loaded_when_little_is_asked_for(code: str) -> None:
    assert loaded(code) == set()


VERBS = [
    "tune",
    "report",
    "kernels",
    "prune",
    "bench",
    "eval",
    "serve",
    "export",
    "predict",
    "calibrate",
    "study",
]


@pytest.mark.parametrize("verb", VERBS)
def test_a_verbs_help_loads_no_model_code(verb: str) -> None:
    code = f"from leanmoe.cli import main; main(['{verb}', '--help'])"
    assert not loaded(code) & {"torch", "transformers", "numba"}
