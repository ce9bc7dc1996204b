"""What a search for tiles may be asked, and what it says to anything else."""

from __future__ import annotations

from typing import Any

import pytest

from leanmoe.cli.kernels_settings import KernelsSettings, parse_shape
from leanmoe.core.errors import LeanMoeError


def test_a_shape_is_four_numbers() -> None:
    assert parse_shape("--shape", "128,2048,768,8") == (128, 2048, 768, 8)
    with pytest.raises(LeanMoeError, match="--shape is '128,2048,768': it must be 4 numbers"):
        parse_shape("--shape", "128,2048,768")
    with pytest.raises(LeanMoeError, match="9 slots are more than 8 experts"):
        parse_shape("--shape", "8,64,32,9")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"action": "tnue"}, "did you mean tune"),
        ({"action": "list", "models": ("m",)}, "list takes no shape"),
        ({"action": "tune"}, "nothing to tune"),
        ({"action": "tune", "models": ("m",), "dtype": "int3"}, "--dtype is 'int3'"),
        ({"action": "tune", "models": ("m",), "most_error": 2.0}, "--most-error is 2"),
    ],
)
def test_what_is_not_allowed_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(LeanMoeError, match=message):
        KernelsSettings(**change).check()
