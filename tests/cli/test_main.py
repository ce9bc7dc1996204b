"""The command line's frame: verbs, exit codes, and one line for a user's mistake."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from leanmoe import __version__, cli
from leanmoe.core.errors import LeanMoeError


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of one command line."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    out, err = capsys.readouterr()
    return int(stopped.value.code or 0), out, err


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Adds a verb `fail` that raises what it is given."""

    def add(error: BaseException) -> None:
        def fail() -> None:
            """Fails."""
            raise error

        module = ModuleType("leanmoe.cli.fail")
        module.fail = fail  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "leanmoe.cli.fail", module)
        monkeypatch.setitem(cli.VERBS, "fail", "Fails.")

    return add


@pytest.mark.parametrize("arguments", [(), ("--help",)])
def test_help_lists_every_verb(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    code, out, err = run(capsys, *arguments)
    assert (code, err) == (0, "")
    assert all(f" {verb} " in out for verb in cli.VERBS)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--version") == (0, f"leanmoe {__version__}\n", "")


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_has_a_file_an_example_and_json(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    function = getattr(importlib.import_module(f"leanmoe.cli.{verb}"), verb)
    assert "leanmoe " + verb in (function.__doc__ or "")
    code, out, _ = run(capsys, verb, "--help")
    assert code == 0
    assert "Example" in out
    assert "--json" in out


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_is_whole_in_a_narrow_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    """Nothing is cut short, and the example stands on one line, to be copied."""
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = run(capsys, verb, "--help")
    assert "…" not in out
    lines = [line.strip() for line in out.splitlines()]
    example = lines[lines.index("Example:") + 1]
    assert example.startswith(f"leanmoe {verb} ")
    assert not lines[lines.index("Example:") + 2]


def test_every_verbs_file_is_listed() -> None:
    folder = Path(cli.__file__).parent
    public = {path.stem for path in folder.glob("*.py") if not path.stem.startswith("_")}
    with_function = {
        name for name in public if hasattr(importlib.import_module(f"leanmoe.cli.{name}"), name)
    }
    assert with_function == set(cli.VERBS)


def test_an_unknown_verb_gets_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "insepct")
    assert (code, out) == (2, "")
    assert err == (
        "leanmoe: No such command 'insepct'. Did you mean 'inspect'? (see leanmoe --help)\n"
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("inspect", "--batch-size", "3"), "No such option: --batch-size"),
        (("inspect", "--bandwidth", "fast"), "--bandwidth"),
        (("inspect", "a", "b"), "unexpected extra argument"),
        (("report",), "Missing"),
    ],
)
def test_a_wrong_command_line_is_one_line(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], words: str
) -> None:
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert words in err
    assert err.count("\n") == 1
    assert err.endswith(f"(see leanmoe {arguments[0]} --help)\n")


def test_a_users_mistake_is_one_line(capsys: pytest.CaptureFixture[str], failing: Any) -> None:
    failing(LeanMoeError("plan x is wrong"))
    assert run(capsys, "fail") == (1, "", "leanmoe: plan x is wrong\n")


@pytest.mark.parametrize("arguments", [("--debug", "fail"), ("fail", "--debug")])
def test_debug_lets_errors_through(failing: Any, arguments: tuple[str, ...]) -> None:
    failing(LeanMoeError("plan x is wrong"))
    with pytest.raises(LeanMoeError):
        cli.main(arguments)


def test_a_bug_is_not_hidden(failing: Any) -> None:
    failing(ZeroDivisionError("a bug"))
    with pytest.raises(ZeroDivisionError):
        cli.main(["fail"])


def test_ctrl_c_is_one_line(capsys: pytest.CaptureFixture[str], failing: Any) -> None:
    failing(KeyboardInterrupt())
    assert run(capsys, "fail") == (130, "", "leanmoe: interrupted\n")


def test_a_missing_extra_says_what_to_install(
    capsys: pytest.CaptureFixture[str], failing: Any
) -> None:
    failing(ModuleNotFoundError("No module named 'torch'", name="torch.nn"))
    code, _, err = run(capsys, "fail")
    assert code == 1
    assert err == "leanmoe: torch.nn is not installed: pip install 'leanmoe[tune]'\n"
