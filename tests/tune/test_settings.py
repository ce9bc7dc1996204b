"""What a tune run may be asked, and the bands that its loads come to."""

from __future__ import annotations

from dataclasses import replace

import pytest

from leanmoe.core.errors import LeanMoeError
from leanmoe.tune.settings import TuneSettings

SETTINGS = TuneSettings(model="reference")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"concurrency": (8, 1)}, "concurrency is"),
        ({"concurrency": ()}, "concurrency is"),
        ({"batch_draws": 0}, "batch-draws is 0"),
        ({"text": (("a", "x"), ("a", "y"))}, "two --text are of one kind"),
        ({"confidence": 1.0}, "confidence is 1.0"),
        ({"repeats": 1}, "repeats is 1"),
        ({"input_len": 4}, "input-len is 4"),
    ],
)
def test_settings_out_of_range_are_named(changed: dict[str, object], message: str) -> None:
    with pytest.raises(LeanMoeError, match=message):
        replace(SETTINGS, **changed).check()  # type: ignore[arg-type]


def test_bands_meet_between_loads() -> None:
    assert replace(SETTINGS, concurrency=(1, 8, 32)).band_ends() == {1: 2, 8: 16, 32: 64}


def test_replies_are_as_long_as_the_loads_and_prompts_around_its_length() -> None:
    settings = TuneSettings("reference", input_len=256, output_len=8)
    window, prompt, reply = settings.scored_window(can_branch=True)
    assert (prompt, reply, window) == (192, 8, 320)
    assert settings.scored_window(can_branch=False) == (264, 256, 0)
