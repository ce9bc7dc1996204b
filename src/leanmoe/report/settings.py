"""What `leanmoe report` is asked to do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from leanmoe.core.options import argument


@dataclass(frozen=True)
class ReportSettings:
    """The settings of one page."""

    run: Path = argument("The folder of a run of tune, bench, eval, study or predict --sweep.")

    def check(self) -> None:
        """Nothing that stands by itself can be wrong: the run's results are checked when read."""
