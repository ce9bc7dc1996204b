"""What the command line alone has: JSON and words on standard output."""

from __future__ import annotations

import pytest

from leanmoe.cli.options import make_console, print_json


def test_json_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": [1, None]})
    assert capsys.readouterr().out == '{"a": [1, null]}\n'


def test_brackets_in_names_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    make_console().print("plan [bold]x[/bold]")
    assert capsys.readouterr().out == "plan [bold]x[/bold]\n"
