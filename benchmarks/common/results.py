"""Results files of benchmarks: their folder, their names and their provenance."""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path
from typing import Any

from leanmoe.core import provenance
from leanmoe.core.files import write_json

RESULTS = Path(__file__).parents[1] / "results"
"""The committed results."""


def parser_of(doc: str | None, **settings: Any) -> argparse.ArgumentParser:
    """A parser that describes a benchmark by the first line of its module's docstring.

    It has `--output`, the folder of the results: $OUT where that is set, else `RESULTS`.
    """
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0], **settings)
    folder = Path(os.environ.get("OUT", RESULTS))
    parser.add_argument("--output", type=Path, default=folder, help="folder of the results file")
    return parser


def command() -> str:
    """The command line that started this process, by the module's name where it was run so."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = f"python -m {spec.name}" if spec else f"python {sys.argv[0]}"
    return " ".join([program, *sys.argv[1:]])


def collect(seed: int | None = None) -> provenance.Provenance:
    """The provenance of this process."""
    return provenance.collect(command(), seed)


def file_of(folder: Path, name: str, made: provenance.Provenance, machines: str = "") -> Path:
    """`folder`/DATE-HARDWARE-COMMIT-`name`.json; `machines` ("2x-") stands before the hardware."""
    hardware = re.sub(r"[^a-z0-9]+", "-", made.hardware.lower()).strip("-")
    return folder / f"{made.date[:10]}-{machines}{hardware}-{made.commit}-{name}.json"


def write(path: Path, made: provenance.Provenance, label: str, content: dict[str, Any]) -> Path:
    """Writes what was measured with its label and provenance; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"label": label, "provenance": made.to_json(), **content})
    return path
