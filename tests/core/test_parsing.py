"""How the words of a command line are read."""

from __future__ import annotations

import pytest

from leanmoe.core.errors import LeanMoeError
from leanmoe.core.parsing import (
    flag,
    parse_counts,
    parse_numbers,
    parse_range,
    parse_share,
    require,
)


def test_numbers_are_numbers() -> None:
    assert parse_numbers("--request-rate", "0.5,2", float) == (0.5, 2.0)
    for text in ("", "a", "1,,2", "nan"):
        with pytest.raises(LeanMoeError, match="--request-rate is"):
            parse_numbers("--request-rate", text, float)


def test_counts_are_1_or_more() -> None:
    assert parse_counts("--concurrency", "1,8,32") == (1, 8, 32)
    with pytest.raises(
        LeanMoeError, match="--concurrency is '8,0': it holds 0, and each must be 1"
    ):
        parse_counts("--concurrency", "8,0")
    with pytest.raises(LeanMoeError, match=r"--concurrency is '1.5': it must be numbers like"):
        parse_counts("--concurrency", "1.5")


def test_a_range_is_one_number_or_two_that_rise() -> None:
    assert parse_range("--input-len", "1024", 1, 4096) == (1024, 1024)
    assert parse_range("--input-len", "512:2048", 1, 4096) == (512, 2048)
    for text in ("", "x", "2048:512", "1:2:3", "0", "5000", "512-2048"):
        with pytest.raises(LeanMoeError, match=f"--input-len is '{text}'.*from 1 to 4,096"):
            parse_range("--input-len", text, 1, 4096)


def test_a_share_is_a_percentage_or_a_bare_number() -> None:
    assert parse_share("--margin", "0.5%") == 0.005
    assert parse_share("--margin", "0.005") == 0.005
    assert parse_share("--margin", "1", in_points=True) == 0.01
    assert parse_share("--margin", "1%", in_points=True) == 0.01
    with pytest.raises(LeanMoeError, match=r"--margin is 'much': .* a share like 0.5% or 0.005"):
        parse_share("--margin", "much")
    with pytest.raises(LeanMoeError, match="percentage points like 1"):
        parse_share("--margin", "much", in_points=True)


def test_what_does_not_hold_is_named_with_its_value_and_what_is_allowed() -> None:
    require(True, "--repeats", 3, "at least 3")
    with pytest.raises(LeanMoeError, match=r"^--repeats is 2: it must be at least 3$"):
        require(False, "--repeats", 2, "at least 3")


def test_a_flag_is_a_settings_name_as_the_command_line_spells_it() -> None:
    assert flag("tensor_parallel_size") == "--tensor-parallel-size"
