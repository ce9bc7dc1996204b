"""The table of environment variables: it names every one that the source reads."""

from __future__ import annotations

import re
from pathlib import Path

import leanmoe
from leanmoe.core import environment
from leanmoe.core.environment import VARIABLES

SOURCE = Path(leanmoe.__file__).parent


def test_every_variable_in_the_source_is_in_the_table() -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in SOURCE.rglob("*.py"))
    assert set(re.findall(r"LEANMOE_[A-Z_]+[A-Z]", text)) == {each.name for each in VARIABLES}


def test_every_name_has_a_row_and_every_row_says_all() -> None:
    names = [value for name, value in vars(environment).items() if name.isupper()]
    assert [each.name for each in VARIABLES] == [n for n in names if isinstance(n, str)]
    for each in VARIABLES:
        assert each.default
        assert each.allowed
        assert each.meaning.endswith(".")
