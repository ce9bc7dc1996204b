"""Finds out which verb's results a folder holds."""

from __future__ import annotations

from pathlib import Path

from leanmoe.core.errors import LeanMoeError
from leanmoe.core.files import read_json
from leanmoe.core.schema import ResultsFile
from leanmoe.results.bench import BenchResults
from leanmoe.results.eval import EvalResults
from leanmoe.results.predict import SweepResults
from leanmoe.results.study import StudyResults
from leanmoe.results.tune import TuneResults

KINDS: tuple[type[ResultsFile], ...] = (
    TuneResults,
    BenchResults,
    EvalResults,
    StudyResults,
    SweepResults,
)
FILES = ("results.json", "study.json")
"""What verbs call their results in a run's folder."""


def read_any(folder: Path) -> ResultsFile:
    """The results in a run's folder, of whichever verb they are.

    Raises LeanMoeError where there are none, or none that this version reads.
    """
    path = next((folder / name for name in FILES if (folder / name).exists()), folder / FILES[0])
    value = read_json(path, "results")
    for kind in KINDS:
        if isinstance(value, dict) and kind.KIND in value:
            return kind.from_json(value, str(path))
    raise LeanMoeError(
        f"results {path} are of no verb that has a page: they hold none of "
        f"{', '.join(kind.KIND for kind in KINDS)}"
    )
