"""What `leanmoe prune` is asked to do; every default stands here. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from leanmoe.core.options import (
    DTYPE_HELP,
    MODEL_HELP,
    SEED_HELP,
    TEXT_HELP,
    TRUST_HELP,
    argument,
    option,
)
from leanmoe.core.parsing import require


@dataclass(frozen=True)
class PruneSettings:
    """The settings of one pruning."""

    model: str = argument(MODEL_HELP)
    keep: str = option("75%", "Share or number of a layer's experts that remain.")
    criterion: str = option(
        "reap",
        "How experts are ranked: random, odd, even, first-half, last-half, activate-count, "
        "soft-count (arXiv 2505.03531), reap, easy-ep, output-sum or output-error.",
    )
    text: str | None = option(None, TEXT_HELP)
    tokens: int = option(32768, "Tokens of calibration text that experts are ranked on.")
    seed: int = option(0, SEED_HELP)
    protect: bool = option(True, "Keep experts with extreme outputs whatever their score.")
    as_plan: bool = option(False, "Write plan.json and touch no weights.")
    dtype: str | None = option(None, DTYPE_HELP)
    trust_remote_code: bool = option(False, TRUST_HELP)

    def check(self) -> None:
        """Raises LeanMoeError for the first setting out of range."""
        require(self.tokens >= 16, "--tokens", self.tokens, "at least 16")
