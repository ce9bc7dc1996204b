"""A vLLM that was never run is known by the signatures of what leanmoe touches in it."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from leanmoe.core.errors import LeanMoeError
from leanmoe.core.installed_vllm import RAN
from leanmoe.serve.vllm import installation
from leanmoe.serve.vllm.hook_signatures import ABSENT, known_signatures
from leanmoe.serve.vllm.installation import EQUAL, THERE, check_hooks, naming, nearest, version

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
