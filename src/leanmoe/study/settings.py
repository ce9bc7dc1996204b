"""What `leanmoe study` is asked to do; every default stands here. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from leanmoe.core.options import SEED_HELP, TEXT_HELP, option
from leanmoe.core.parsing import require


@dataclass(frozen=True)
class StudySettings:
    """The settings of one study."""

    quality: str = option(
        "measured",
        "Where quality comes from: 'measured' here (minutes), 'none', or the JSON of an earlier "
        "study.",
    )
    model: str = option(
        "reference", "The model that quality is measured on: a folder, a Hub name or 'reference'."
    )
    text: str | None = option(None, TEXT_HELP)
    quick: bool = option(False, "Measure quality on little text, to see that it runs.")
    tuned: Path | None = option(
        None, "The results.json of a leanmoe tune: what a searched plan gave, measured."
    )
    seed: int = option(0, SEED_HELP)

    def check(self) -> None:
        """Raises LeanMoeError for a setting that is not allowed."""
        known = self.quality in ("measured", "none") or self.quality.endswith(".json")
        require(known, "--quality", repr(self.quality), "'measured', 'none' or a study.json")
