"""Signatures read from text: what a caller can see counts, and nothing else."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from leanmoe.core.errors import LeanMoeError
from leanmoe.core.installed_vllm import RAN
from leanmoe.serve.vllm import installation
from leanmoe.serve.vllm.installation import (
    ABSENT,
    EQUAL,
    EXPERTS,
    OPTIONAL,
    ROWS,
    RUNNERS,
    SYMBOLS,
    THERE,
    check_hooks,
    check_rows,
    known_signatures,
    naming,
    nearest,
    read_signatures,
    symbols_of,
    version,
)

COMPUTE = "model_executor.layers.fused_moe.router.base_router:BaseRouter._compute_routing"


def one(text: str, name: str = "f") -> str:
    """The hash of `name` in a module of this text."""
    return read_signatures({"m.py": text}.get, [f"m:{name}"])[f"m:{name}"]


@pytest.mark.parametrize(
    "same",
    [
        "def f(a, b=2, *, c): ...",
        "def f(a: int, b: int = 1, *, c: str) -> None:\n    return 5",
        "@functools.wraps(g)\ndef f(a, b=None, *, c): ...",
        "if cuda:\n    def f(a, b=1, *, c): ...\nelse:\n    def f(a, b=9, *, c): ...",
    ],
)
def test_annotations_values_and_bodies_do_not_count(same: str) -> None:
    assert one(same) == one("def f(a, b=1, *, c): ...")


@pytest.mark.parametrize(
    "other",
    [
        "def f(a, b, *, c): ...",
        "def f(a, b=1, *, c=3): ...",
        "def f(a, b=1, c=2): ...",
        "def f(a, x=1, *, c): ...",
        "def f(a, /, b=1, *, c): ...",
        "def f(a, b=1, *rest, c): ...",
        "def f(a, b=1, *, c, **more): ...",
        "class f: ...",
        "if cuda:\n    def f(a, b=1, *, c): ...\nelse:\n    def f(a): ...",
    ],
)
def test_what_a_caller_can_see_counts(other: str) -> None:
    assert one(other) not in (ABSENT, one("def f(a, b=1, *, c): ..."))


def test_a_field_a_property_and_what_a_method_sets_are_all_attributes() -> None:
    forms = [
        "class C:\n    x: int",
        "class C:\n    x = 1",
        "class C:\n    @property\n    def x(self): ...",
        "class C:\n    def __init__(self):\n        self.x = 1",
    ]
    assert len({one(form, "C.x") for form in forms}) == 1
    assert one("class C:\n    def x(self): ...", "C.x") != one(forms[0], "C.x")
    assert one("class C:\n    @staticmethod\n    def x(a): ...", "C.x") != one(
        "class C:\n    def x(a): ...", "C.x"
    )


def test_reading_an_attribute_does_not_make_it_one() -> None:
    text = "class C:\n    def f(self):\n        return self.x + other.x"
    assert one(text, "C.x") == ABSENT


def test_a_missing_file_class_or_name_is_absent() -> None:
    assert read_signatures(dict[str, str]().get) == dict.fromkeys(SYMBOLS, ABSENT)
    assert one("class D: ...", "C.x") == one("def g(): ...") == ABSENT


def test_the_committed_file_has_every_symbol_of_every_version() -> None:
    known = known_signatures()
    assert {"0.24.0", "0.26.0", "0.32.0", "0.33.0"} <= set(known)
    for number, signatures in known.items():
        assert list(signatures) == list(SYMBOLS), number
        later = {"forward_context:ForwardContext.is_padding"} if number == "0.24.0" else set()
        absent = {symbol for symbol, one in signatures.items() if one == ABSENT}
        assert absent - set(symbols_of(OPTIONAL)) == later, number


def test_only_what_is_tried_at_load_changed_since_0_24() -> None:
    """Else a version between those that ran could be called wrongly."""
    known = known_signatures()
    changed = {
        symbol
        for symbol in SYMBOLS
        if len({signatures[symbol] for signatures in known.values()} - {ABSENT}) > 1
    }
    assert changed <= set(symbols_of(EXPERTS, RUNNERS, ROWS))
    assert known["0.24.0"][COMPUTE] == known["0.33.0"][COMPUTE] != ABSENT


COMPUTE = "model_executor.layers.fused_moe.router.base_router:BaseRouter._compute_routing"


def read(_: str) -> str | None:
    return None


@pytest.fixture
def signatures(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The signatures of the vLLM that is installed, as those of 0.31.0."""
    found = dict(known_signatures()["0.31.0"])
    monkeypatch.setattr(installation, "read_signatures", lambda *_: found)
    return found


def test_versions_that_ran_are_those_whose_signatures_are_known() -> None:
    assert set(RAN) <= set(known_signatures())
    for ran in RAN:
        assert check_hooks(ran, read) == f"vLLM {ran} is one that leanmoe ran with"


@pytest.mark.parametrize("number", sorted(known_signatures()))
def test_every_version_whose_files_were_read_is_as_one_that_ran(
    number: str, signatures: dict[str, str]
) -> None:
    signatures.update(known_signatures()[number])
    assert nearest(read)[1] == []


def test_a_version_that_was_never_run_is_told_by_what_it_is_like(
    signatures: dict[str, str],
) -> None:
    said = check_hooks("0.31.9", read)
    assert said.startswith("vLLM 0.31.9 was never run with leanmoe, but is as 0.")
    for symbol, value in ((COMPUTE, "0" * 12), (THERE[0], ABSENT), (EQUAL[-1], ABSENT)):
        with pytest.MonkeyPatch.context() as changed:
            changed.setitem(signatures, symbol, value)
            with pytest.raises(LeanMoeError, match=r"vLLM 0\.31\.9 was never run") as caught:
                check_hooks("0.31.9", read)
            assert symbol in str(caught.value)
            assert RAN[-1] in str(caught.value)


def test_a_file_that_is_not_there_is_no_signature() -> None:
    with pytest.raises(LeanMoeError, match="was never run with leanmoe"):
        check_hooks("0.99.0", read)


def test_a_refusal_names_the_version_once() -> None:
    assert str(naming(LeanMoeError("no; unset it"), "0.32.0")) == "vLLM 0.32.0: no; unset it"
    assert str(naming(LeanMoeError("vLLM 0.32.0 is old"), "0.32.0")) == "vLLM 0.32.0 is old"


def test_the_version_is_without_the_build(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("vllm")
    module.__version__ = "0.32.0+cpu"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    assert version() == "0.32.0"


def test_a_vllm_that_cannot_tell_prompt_rows_apart_is_refused(signatures: dict[str, str]) -> None:
    check_rows("0.31.9", read)
    last = symbols_of(ROWS)[-1]
    signatures[last] = ABSENT
    with pytest.raises(LeanMoeError, match=rf"^vLLM 0\.31\.9 has no {last}, .*LEANMOE_DROP=prompt"):
        check_rows("0.31.9", read)
