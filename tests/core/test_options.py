"""Settings from words, from a call and from a file: one reader, one default, near names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from leanmoe.core.errors import LeanMoeError
from leanmoe.core.options import (
    argument,
    make_settings,
    numbers_text,
    option,
    percent_text,
    read_config,
)
from leanmoe.core.parsing import parse_counts, parse_share


@dataclass(frozen=True)
class Asked:
    """Settings of some verb."""

    model: str = argument("A model.")
    concurrency: tuple[int, ...] = option((1, 8), "Loads.", parse=parse_counts, text=numbers_text)
    margin: float = option(0.005, "Most loss.", parse=parse_share, text=percent_text)
    plan: tuple[Path, ...] = option((), "Plans.", repeats=True)


@pytest.mark.parametrize(
    ("given", "name", "value"),
    [
        ({"concurrency": "1,32"}, "concurrency", (1, 32)),
        ({"concurrency": [1, 32]}, "concurrency", (1, 32)),
        ({"concurrency": 32}, "concurrency", (32,)),
        ({"margin": "0.5%"}, "margin", 0.005),
        ({"margin": 0.01}, "margin", 0.01),
        ({"plan": Path("plan.json")}, "plan", (Path("plan.json"),)),
    ],
)
def test_words_numbers_and_lists_come_to_the_same(
    given: dict[str, Any], name: str, value: object
) -> None:
    assert getattr(make_settings(Asked, {"model": "reference", **given}), name) == value


def test_names_that_are_no_setting_and_settings_that_are_missing_are_said() -> None:
    with pytest.raises(LeanMoeError, match="did you mean margin"):
        make_settings(Asked, {"model": "reference", "margn": 0.1})
    with pytest.raises(LeanMoeError, match="model is not given"):
        make_settings(Asked, {})


def test_defaults_in_words_are_read_as_the_defaults() -> None:
    assert tuple(parse_counts("--concurrency", numbers_text((1, 8, 32)))) == (1, 8, 32)
    assert parse_share("--margin", percent_text(0.005)) == 0.005


def test_a_config_file_may_name_options_as_the_command_line_does(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('input-len = 64\noutput_len = 8\nconcurrency = "1,8"\n')
    names = ("input_len", "output_len", "concurrency")
    assert read_config(path, names) == {"input_len": 64, "output_len": 8, "concurrency": "1,8"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("input-lne = 64", "did you mean input-len"),
        ("[input-len]\nleast = 1", "input-len is a table"),
        ("input-len = ", "cannot read config"),
    ],
)
def test_a_config_file_with_a_mistake_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "run.toml"
    path.write_text(text)
    with pytest.raises(LeanMoeError, match=message):
        read_config(path, ["input_len"])
