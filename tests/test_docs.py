"""What the documentation says exists: its links, its files, its commands' options."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from leanmoe.cli import VERBS, app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "reference_model/README.md", *ROOT.glob("docs/*.md")]


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_links_lead_to_files(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)|<img src=\"([^\"]+)\"", text):
        name = target[0] or target[1]
        if not name.startswith("http"):
            assert (page.parent / name).exists(), f"{page.name} links to {name}"


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_commands_have_the_verbs_and_options_that_are_shown(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    blocks = "\n".join(re.findall(r"^```sh\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL))
    for line in re.findall(r"^leanmoe (\S.*)$", blocks, flags=re.MULTILINE):
        words = line.split("#")[0].split()
        assert words[0] in VERBS, f"{page.name}: leanmoe {line}"
        help_text = CliRunner().invoke(app, [words[0], "--help"], env={"COLUMNS": "200"}).output
        for option in [word for word in words if word.startswith("-")]:
            assert option in help_text, f"{page.name}: {option} is no option of {words[0]}"


def test_makefile_has_the_two_commands() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(r"^demo:", text, flags=re.MULTILINE)
    assert re.search(r"^test:", text, flags=re.MULTILINE)
