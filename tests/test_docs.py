"""What the documentation says holds: its links, anchors, commands, words and sentences."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path
from unicodedata import normalize

import pytest
from typer.testing import CliRunner

import leanmoe
from leanmoe import Plan, Rule
from leanmoe.cli import VERBS, app
from leanmoe.models.families import FAMILIES
from leanmoe.models.reference import path as reference_path
from leanmoe.models.shape import read_shape
from scripts import docs_reference

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
SITE = sorted(DOCS.rglob("*.md"))
LOOSE = ["README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"]
PAGES = [
    *(ROOT / name for name in LOOSE),
    ROOT / "benchmarks/README.md",
    ROOT / "reference_model/README.md",
    *SITE,
]
GUIDE = sorted(DOCS.glob("guide/*.md"))
PROSE = [
    page for page in PAGES if page.parent.name != "reference_model" and page.name != "CHANGELOG.md"
]
"""The reference model's card is written from its results; a changelog has no sentences."""
MOST_WORDS_IN_A_SENTENCE = 25
MOST_WORDS_BEFORE_SUCCESS = 300
NOT_RUN = re.compile(r"<!-- not run: (.+?) -->\n\Z", re.DOTALL)
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
WRITTEN = {str(DOCS / name): write for name, write in docs_reference.PAGES.items()}
"""Pages that exist only while the site is built, and what writes them."""
PRIVATE_WORDS = re.compile(
    r"\b(?:company|ballots?|awake|wakes?|woken?|honour(?:ed|s)?|lots|work list|mixes)\b",
    re.IGNORECASE,
)
WORST = [
    "Left out are steps that may hold a prompt",
    "one that stays away costs the others",
    "It takes the ids as they stand there",
    "The tuner's processes compiled for nothing until",
    "Small steps are taken as leanmoe's plugin has them",
    "Know what a plan costs on your model before you measured it",
    "Speed of single steps over the full model's",
]
"""Sentences that a review named as the worst: none may come back."""


def ids(pages: list[Path]) -> list[str]:
    return [str(page.relative_to(ROOT)) for page in pages]


def text_of(page: Path) -> str:
    """The page's source, or what is written for it when the site is built."""
    write = WRITTEN.get(str(page))
    return write() if write else page.read_text(encoding="utf-8")


def anchors_of(text: str) -> set[str]:
    """The anchors of a page's headings, as Python-Markdown names them."""
    anchors: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", BLOCK.sub("", text), flags=re.MULTILINE):
        plain = re.sub(r"\[([^\]]+)\]\([^)]*\)", r"\1", heading)
        plain = normalize("NFKD", plain).encode("ascii", "ignore").decode()
        slug = re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower())
        anchors.add(slug)
    return anchors


def blocks_of(text: str, *languages: str) -> list[tuple[str, str, str | None]]:
    """Each code block of these languages: language, code, and why it is not run, if it is not."""
    found = []
    for match in BLOCK.finditer(text):
        if match[1] in languages:
            reason = NOT_RUN.search(text[: match.start()])
            found.append((match[1], match[2], reason and reason[1]))
    return found


def commands_of(text: str) -> list[str]:
    """The `leanmoe` commands of a page's shell blocks, one line each."""
    shell = "\n".join(code for _, code, _ in blocks_of(text, "sh"))
    joined = re.sub(r"\\\n\s*", "", shell)
    return re.findall(r"^(?:\w+=\S+ )*leanmoe (\S.*)$", joined, flags=re.MULTILINE)


def sentences_of(text: str) -> list[str]:
    """The sentences of a page's prose: no code, table, heading, comment or link target."""
    text = re.sub(r"<!--.*?-->", "", BLOCK.sub("", text), flags=re.DOTALL)
    text = re.sub(r"^(?:\||#).*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"\[([^\]]+)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"`[^`]*`", "code", text)
    pieces = re.split(r"\n\s*\n|^\s*(?:[-*]|\d+\.) ", text, flags=re.MULTILINE)
    return [
        sentence
        for piece in pieces
        for sentence in re.split(r"(?<=[.!?])\**\s+", " ".join(piece.split()))
        if sentence
    ]


@pytest.mark.parametrize("page", PAGES, ids=ids(PAGES))
def test_links_lead_to_files_and_anchors(page: Path) -> None:
    text = BLOCK.sub("", text_of(page))
    for first, second in re.findall(r"\]\(([^)\s]+)\)|<img src=\"([^\"]+)\"", text):
        target = first or second
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        linked = Path(os.path.normpath(page.parent / name)) if name else page
        assert linked.exists() or str(linked) in WRITTEN, f"{page.name} links to {name}"
        if anchor:
            assert anchor in anchors_of(text_of(linked)), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=ids(PAGES))
def test_commands_have_the_verbs_and_options_that_are_shown(page: Path) -> None:
    for line in commands_of(text_of(page)):
        words = re.sub(r"'[^']*'", "quoted", line.split(" #")[0].split(" -- ")[0]).split()
        assert words[0] in VERBS, f"{page.name}: leanmoe {line}"
        help_text = CliRunner().invoke(app, [words[0], "--help"], env={"COLUMNS": "200"}).output
        for option in [word for word in words if word.startswith("-")]:
            assert option in help_text, f"{page.name}: {option} is no option of {words[0]}"


@pytest.mark.parametrize("page", PAGES, ids=ids(PAGES))
def test_benchmarks_and_scripts_that_are_named_exist(page: Path) -> None:
    for module in re.findall(r"python -m ((?:benchmarks|reference_model)[\w.]*)", text_of(page)):
        path = ROOT.joinpath(*module.split("."))
        assert path.with_suffix(".py").exists() or path.is_dir(), f"{page.name}: {module}"


@pytest.mark.parametrize("page", PAGES, ids=ids(PAGES))
def test_pages_use_the_words_of_the_glossary(page: Path) -> None:
    text = text_of(page)
    assert not PRIVATE_WORDS.findall(BLOCK.sub("", text))
    assert not [sentence for sentence in WORST if sentence in " ".join(text.split())]


@pytest.mark.parametrize("page", PROSE, ids=ids(PROSE))
def test_sentences_are_short(page: Path) -> None:
    sentences = sentences_of(text_of(page))
    long = [s for s in sentences if len(s.split()) > MOST_WORDS_IN_A_SENTENCE]
    assert sentences
    assert not long


@pytest.mark.parametrize("page", GUIDE, ids=ids(GUIDE))
def test_a_guide_comes_to_its_first_success_soon(page: Path) -> None:
    text = text_of(page)
    first = BLOCK.search(text)
    assert first is not None
    assert len(text[: first.end()].split()) <= MOST_WORDS_BEFORE_SUCCESS


@pytest.fixture
def reader(tmp_path: Path) -> dict[str, str]:
    """A reader's folder, with a plan and a text of their own, and `leanmoe` on their path."""
    shape = read_shape(str(reference_path()))
    Plan.uniform(shape.fingerprint(), Rule(top_k=6)).save(tmp_path / "plan.json")
    text = "\n\n".join(page.read_text(encoding="utf-8") for page in SITE)
    (tmp_path / "my.txt").write_text(text, encoding="utf-8")
    command = tmp_path / "bin" / "leanmoe"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m leanmoe "$@"\n', encoding="utf-8")
    command.chmod(0o755)
    paths = {
        "PATH": f"{command.parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": f"{Path(leanmoe.__file__).parents[1]}{os.pathsep}{ROOT}",
    }
    return {**os.environ, **paths, "HF_HUB_OFFLINE": "1"}


@pytest.mark.slow
@pytest.mark.parametrize("page", GUIDE, ids=ids(GUIDE))
def test_a_guide_can_be_followed(page: Path, tmp_path: Path, reader: dict[str, str]) -> None:
    for language, code, reason in blocks_of(text_of(page), "sh", "python"):
        if reason is not None:
            continue
        shell = ["bash", "-ec", code] if language == "sh" else [sys.executable, "-c", code]
        done = subprocess.run(
            shell, cwd=tmp_path, env=reader, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("page", SITE, ids=ids(SITE))
def test_what_is_not_run_says_why(page: Path) -> None:
    if page in GUIDE:
        return  # those are run, or say so: the test above
    assert all(reason for *_, reason in blocks_of(text_of(page), "sh", "python"))


@pytest.mark.slow
def test_the_site_is_built_strictly_and_needs_no_network(tmp_path: Path) -> None:
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert built.returncode == 0, built.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert pages
    for page in pages:
        loaded = re.findall(
            r"<(?:script|img|iframe|link)\b[^>]*?(?:src|href)=\"?(https?:[^\"\s>]+)",
            page.read_text(encoding="utf-8"),
        )
        assert not loaded, f"{page.name} loads {loaded}"


def test_every_written_table_has_a_place_in_a_page() -> None:
    pages = "\n".join(page.read_text(encoding="utf-8") for page in SITE)
    placed = re.findall(r"<!-- generated: .*? -->", pages)
    assert sorted(placed) == sorted(docs_reference.TABLES)
    assert "| `LEANMOE_PLAN` |" in docs_reference.environment_table()


def test_every_generated_page_says_what_its_subject_is() -> None:
    for verb in VERBS:
        assert f"\n## {verb}\n" in docs_reference.cli_page()
    assert "| deepseek_v3 |" in docs_reference.families_page()
    where = docs_reference.run_in_vllm()
    assert where["deepseek_v3"] == ["tests (CPU)", "H100"]
    assert where["gemma4_text"] == ["tests (CPU)"]
    assert set(where) <= set(FAMILIES)
    assert "`leanmoe.Plan`" in docs_reference.python_page()
    assert "| T | tokens" in docs_reference.letters_table()


@pytest.mark.parametrize("page", PAGES, ids=ids(PAGES))
def test_rows_of_a_table_have_as_many_cells_as_its_head(page: Path) -> None:
    lines = BLOCK.sub("", text_of(page)).splitlines()
    columns = 0
    for line in lines:
        cells = len(re.findall(r"(?<!\\)\|", re.sub(r"`[^`]*`", "", line)))
        if line.startswith("|"):
            columns = columns or cells
            assert cells == columns, line
        else:
            columns = 0


def test_error_messages_that_are_explained_are_the_source_s() -> None:
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in ROOT.glob("src/**/*.py")]
    words = [
        node.value
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    page = (DOCS / "reference/errors.md").read_text(encoding="utf-8")
    messages = re.findall(r"^\| `([^`]+)`[^|]* \|", page, flags=re.MULTILINE)
    assert len(messages) > 5
    pieces = [piece.strip(" '") for message in messages for piece in message.split("…")]
    assert not [piece for piece in pieces if not any(piece in word for word in words)]


def test_makefile_has_the_two_commands() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(r"^demo:", text, flags=re.MULTILINE)
    assert re.search(r"^test:", text, flags=re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=ids(PAGES))
def test_files_that_a_page_names_exist(page: Path) -> None:
    for name in re.findall(r"`((?:[\w-]+/)+[\w-]+\.(?:py|md|json))`", text_of(page)):
        places = (ROOT / name, Path(leanmoe.__file__).parent / name, ROOT / "src" / name)
        is_made = name.startswith(("runs/", "tests/test_layout"))
        assert is_made or any(place.exists() for place in places), name


def test_pages_that_the_source_names_exist() -> None:
    source = "\n".join(p.read_text(encoding="utf-8") for p in ROOT.glob("src/**/*.py"))
    assert all((ROOT / name).exists() for name in re.findall(r"docs/[\w./-]+\.md", source))
