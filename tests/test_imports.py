"""Who may import whom, read from the source, and what is loaded when little is asked for."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import leanmoe

SOURCE = Path(leanmoe.__file__).parent
ORDER = (
    "core",
    "models",
    "plan",
    "results",
    "stats",
    "routing",
    "kernels",
    "runtime",
    "scoring",
    "profile",
    "prune",
    "bench",
    "predict",
    "serve",
    "tune",
    "eval",
    "study",
    "report",
    "cli",
)
"""The packages of leanmoe: each may import itself and those before it."""
PLAIN = ("core", "models", "plan", "results", "stats", "predict", "report")
"""Packages that import neither torch nor an engine, whatever is asked of them."""
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
    """The package of leanmoe a source file belongs to; the two files at the top are of `cli`."""
    relative = path.relative_to(SOURCE)
    return relative.parts[0] if len(relative.parts) > 1 else "cli"


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
    """The other packages of leanmoe that a source file imports, wherever in it."""
    package = ".".join(["leanmoe", *path.relative_to(SOURCE).parts[:-1]])
    names = imported(ast.parse(path.read_text(encoding="utf-8")), package)
    parts = {name.split(".")[1] for name in names if name.startswith("leanmoe.")}
    return (parts & set(ORDER)) - {part(path)}


FILES = sorted(SOURCE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=[str(p.relative_to(SOURCE)) for p in FILES])
def test_packages_import_downward_only(path: Path) -> None:
    allowed = ORDER[: ORDER.index(part(path))]
    assert parts_imported(path) <= set(allowed)


def test_no_files_import_each_other_in_a_loop() -> None:
    modules = {
        ".".join(["leanmoe", *path.relative_to(SOURCE).with_suffix("").parts]): path
        for path in FILES
    }
    graph: dict[str, set[str]] = {}
    for name, path in modules.items():
        package = name.rpartition(".")[0]
        names = imported(ast.parse(path.read_text(encoding="utf-8")), package)
        graph[name] = (names & set(modules)) - {name}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the loop


def test_the_rules_can_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "routing").mkdir()
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "cpu.py").write_text("")
    guilty = tmp_path / "routing" / "route.py"
    monkeypatch.setattr(sys.modules[__name__], "SOURCE", tmp_path)
    for text in (
        "from leanmoe.kernels.cpu.experts import run",
        "import leanmoe.kernels",
        "from leanmoe import kernels",
        "from ..kernels import cpu",
        "def late():\n    from leanmoe.kernels import cpu",
    ):
        guilty.write_text(text)
        assert parts_imported(guilty) == {"kernels"}, text
    guilty.write_text("import torch\nfrom leanmoe.routing.token_rules import x\n")
    assert parts_imported(guilty) == set()


def test_kernels_and_routing_never_import_transformers() -> None:
    for folder in ("kernels", "routing"):
        for path in (SOURCE / folder).rglob("*.py"):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            found = {name.split(".")[0] for name in imported(tree, "leanmoe")}
            assert "transformers" not in found, path


def test_predict_imports_heavy_packages_only_where_one_file_needs_them() -> None:
    allowed = {
        "fit.py": {"scipy"},
        "tables.py": {"pyarrow"},
        "calibrate.py": {"torch", "scipy"},
        "sampled_steps.py": {"torch"},
    }
    for path in (SOURCE / "predict").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found = {name.split(".")[0] for name in imported(tree, "leanmoe.predict")}
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
        "import leanmoe.plan, leanmoe.models.shape",
        "from leanmoe.cli import main; main(['--help'])",
        "from leanmoe.cli import main; main(['inspect', 'reference'])",
        "import leanmoe.predict.prediction, leanmoe.predict.traffic.sweep, leanmoe.study.simulated",
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
