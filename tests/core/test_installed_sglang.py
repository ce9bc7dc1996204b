"""Which SGLang is installed, on stand-ins of the packages' metadata."""

from __future__ import annotations

from importlib import metadata
from types import SimpleNamespace

import pytest

from leanmoe.core import installed_sglang
from leanmoe.core.errors import LeanMoeError
from leanmoe.core.installed_sglang import TESTED, require_sglang


def pretend(monkeypatch: pytest.MonkeyPatch, version: str | None, plugin: str = "") -> None:
    found = None if version is None else object()
    monkeypatch.setattr(installed_sglang, "find_spec", lambda _: found)
    monkeypatch.setattr(metadata, "version", lambda _: version)
    points = [SimpleNamespace(value=plugin)] if plugin else []
    monkeypatch.setattr(metadata, "entry_points", lambda group: points if group else [])


def test_a_plan_needs_the_version_tested_and_the_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, None)
    with pytest.raises(LeanMoeError, match="sglang is not installed"):
        require_sglang(with_plans=False)
    pretend(monkeypatch, "0.5.17")
    assert require_sglang(with_plans=False) == "0.5.17"
    with pytest.raises(LeanMoeError, match=f"SGLang is 0.5.17: a plan needs {TESTED}"):
        require_sglang(with_plans=True)
    pretend(monkeypatch, TESTED, "other.plugin:activate")
    with pytest.raises(LeanMoeError, match="leanmoe's plugin is not among SGLang's"):
        require_sglang(with_plans=True)
    pretend(monkeypatch, TESTED, "leanmoe.serve.sglang.plugin:activate")
    assert require_sglang(with_plans=True) == TESTED
