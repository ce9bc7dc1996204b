"""Which versions of vLLM a plan runs in; needs no torch."""

from __future__ import annotations

from leanmoe.core.errors import LeanMoeError

OLDEST = (0, 24)
TESTED = ("0.24.0", "0.32.0")
"""The oldest and the newest that leanmoe was tested with."""


def check_version(version: str) -> None:
    """Refuses a vLLM from before the hook."""
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if len(numbers) == 2 and numbers < OLDEST:
        raise LeanMoeError(
            f"vLLM is {version}: a plan needs {OLDEST[0]}.{OLDEST[1]} or newer; unset LEANMOE_PLAN "
            "to run the full model"
        )
