"""The command line: one file a verb; a user's mistake is one line on standard error.

A verb is a function in the file of its name here, and a line in `VERBS`. Its file is imported
when it runs, so that `leanmoe --help` needs nothing but typer.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from leanmoe import __version__
from leanmoe.core.errors import LeanMoeError

VERBS = {
    "inspect": "Show what a model is and what fewer experts could gain, from config.json alone.",
    "tune": "Find a faster plan for a model, prove what it costs, measure what it gains.",
    "kernels": "Tune the GPU kernels for a model's experts, or list what is tuned.",
    "prune": "Write a checkpoint or a plan with fewer experts in total.",
    "bench": "Measure throughput and latency over service load, full model and plans in turn.",
    "eval": "Compare plans with the full model on tasks, replies and texts.",
    "serve": "Serve a model under a plan, as OpenAI's API.",
    "export": "Say how to run a plan in vLLM, SGLang, llama.cpp or Transformers.",
    "predict": "Predict what a plan gains on hardware one does not have.",
    "calibrate": "Measure this GPU's constants, so that predictions for it are its own.",
    "study": "Repeat the paper's study, and put its claims in a table.",
    "report": "Write the page of a finished run again, from its saved results.",
}
MISTAKE, USAGE, INTERRUPTED = 1, 2, 130
"""Exit codes: what LeanMoeError says, a wrong command line, Ctrl-C."""
EXTRA = ("torch", "transformers", "safetensors", "numba", "scipy", "plotly", "psutil")
"""Packages that come with leanmoe[tune]."""


class _Verbs(TyperGroup):
    """Lists every verb by its line in `VERBS`; imports the one that runs."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands = {verb: TyperCommand(verb, help=line) for verb, line in VERBS.items()}

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[Any, Any, list[str]]:
        name, command, rest = super().resolve_command(ctx, args)
        return name, command and _load(str(name)), rest


def _load(verb: str) -> Any:
    from leanmoe.cli.verb import as_command

    app = typer.Typer(add_completion=False, rich_markup_mode="rich")
    app.command(verb)(as_command(getattr(import_module(f"leanmoe.cli.{verb}"), verb)))
    return typer.main.get_command(app)


app = typer.Typer(
    name="leanmoe",
    cls=_Verbs,
    help="Makes mixture-of-experts models faster by running fewer experts; proves what it costs.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"leanmoe {__version__}")
        raise typer.Exit


@app.callback(epilog="Try: leanmoe inspect reference, then leanmoe tune reference")
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show an error's traceback.")] = False,
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True),
    ] = False,
) -> None:
    del debug, version  # `main` reads the one, a callback the other


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line and exits: 0, or a code of those above with one line that says why.

    `--debug` may stand anywhere and lets errors through with their traceback.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    try:
        code = app(
            args=[word for word in given if word != "--debug"] or ["--help"],
            prog_name="leanmoe",
            standalone_mode=False,
        )
    except Exception as error:
        if debug:
            raise
        line, code = _explained(error)
        if line is None:
            raise
        _say(line)
        sys.exit(code)
    except KeyboardInterrupt:
        code = INTERRUPTED
    if code == INTERRUPTED:
        _say("interrupted")
    sys.exit(code if isinstance(code, int) else 0)


def _explained(error: Exception) -> tuple[str | None, int]:
    """One line about what a user can put right, and the exit code; None for anything else."""
    if isinstance(error, LeanMoeError):
        return str(error), MISTAKE
    if isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] in EXTRA:
        return f"{error.name} is not installed: pip install 'leanmoe[tune]'", MISTAKE
    if isinstance(error, typer.Abort):
        return "interrupted", INTERRUPTED
    if (message := getattr(error, "format_message", None)) is not None:
        path = getattr(getattr(error, "ctx", None), "command_path", "leanmoe")
        return f"{' '.join(message().split()).rstrip('.')} (see {path} --help)", USAGE
    return None, MISTAKE


def _say(line: str) -> None:
    print(f"leanmoe: {line}", file=sys.stderr)
