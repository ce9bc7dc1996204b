"""What `leanmoe serve --check` finds, version by version."""

from __future__ import annotations

from typing import Any

import pytest

from leanmoe.core.errors import LeanMoeError
from leanmoe.core.installed_vllm import VllmInstall
from leanmoe.serve.vllm import installation, survey
from leanmoe.serve.vllm.installation import ABSENT, known_signatures
from leanmoe.serve.vllm.survey import Finding


def found(
    monkeypatch: pytest.MonkeyPatch, version: str, environ: dict[str, str] | None = None, **at: Any
) -> dict[str, Finding]:
    signatures = {**known_signatures()[version], **at}
    for module in (survey, installation):
        monkeypatch.setattr(module, "read_signatures", lambda *_: signatures)
    monkeypatch.setattr(survey, "check_plugin", lambda: None)
    install = VllmInstall("vllm", at.pop("number", version))
    return {each.name: each for each in survey.survey(install, lambda _: None, environ or {})}


@pytest.mark.parametrize(
    ("version", "v1", "v2", "skipped", "backends"),
    [
        ("0.24.0", "slots", "slots", False, False),
        ("0.26.0", "slots", "slots", True, False),
        ("0.30.0", "slots", "marks", True, False),
        ("0.32.0", "marks", "marks", True, False),
        ("0.33.0", "marks", "marks", True, True),
    ],
)
def test_each_version_has_what_its_files_say(
    monkeypatch: pytest.MonkeyPatch, version: str, v1: str, v2: str, skipped: bool, backends: bool
) -> None:
    seen = found(monkeypatch, version)
    assert v1 in seen["padding, V1 runner"].says
    assert v2 in seen["padding, V2 runner"].says
    assert (seen["skipped slots"].fits, seen["backends"].fits) == (skipped, backends)
    assert all(each.fits for each in seen.values() if each.is_needed)
    assert "vllm.entrypoints.cli.main" in seen["command"].says


def test_what_does_not_fit_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    unset = found(monkeypatch, "0.33.0", {"VLLM_MOE_SKIP_PADDING": "0"})["padding, V2 runner"]
    assert (unset.fits, unset.is_needed) == (False, False)
    assert "unset it" in unset.says
    wrong = found(monkeypatch, "0.32.0", {"LEANMOE_PLAN": "p.json", "LEANMOE_EXPERTS": "fast"})
    assert "LEANMOE_EXPERTS is 'fast'" in wrong["variables"].says
    gone = dict.fromkeys(known_signatures()["0.32.0"], ABSENT)
    for module in (survey, installation):
        monkeypatch.setattr(module, "read_signatures", lambda *_: gone)

    def missing() -> None:
        raise LeanMoeError("leanmoe's plugin is not among vLLM's")

    monkeypatch.setattr(survey, "check_plugin", missing)
    seen = survey.survey(VllmInstall("vllm", "0.99.0"), lambda _: None, {})
    needed = {each.name: each.fits for each in seen if each.is_needed}
    assert needed == {"version": False, "plugin": False, "variables": True}
    old = survey.survey(VllmInstall("vllm", "0.19.0"), lambda _: None, {})
    assert "a plan needs 0.24 or newer" in old[0].says
