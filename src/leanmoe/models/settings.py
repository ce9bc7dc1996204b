"""What `leanmoe inspect` is asked; every default stands here."""

from __future__ import annotations

from dataclasses import dataclass

from leanmoe.core.options import MODEL_HELP, argument, option
from leanmoe.core.parsing import parse_counts, require


@dataclass(frozen=True)
class InspectSettings:
    """The settings of one look at a model."""

    model: str = argument(MODEL_HELP, "reference")
    batch_sizes: tuple[int, ...] = option(
        tuple(2**n for n in range(13)),
        "Numbers of tokens in a decode step, comma separated.",
        parse=parse_counts,
        text=lambda values: ", ".join(map(str, values)),
    )
    bandwidth: float | None = option(
        None, "Memory bandwidth in GB/s; adds the least time that a step can take."
    )

    def check(self) -> None:
        """Raises LeanMoeError for a setting out of range."""
        if self.bandwidth is not None:
            require(self.bandwidth > 0, "--bandwidth", f"{self.bandwidth:g}", "above 0")
