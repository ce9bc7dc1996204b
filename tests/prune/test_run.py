"""Ranking experts and writing a plan without some, from settings to the result."""

from __future__ import annotations

from pathlib import Path

import pytest

from leanmoe.plan import Plan
from leanmoe.prune.allocation import Evolution
from leanmoe.prune.run import checkpoint_folder, prune
from leanmoe.prune.settings import PruneSettings


def test_layers_of_a_plan_may_keep_different_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = Evolution(generations=2, children=3)
    monkeypatch.setattr("leanmoe.prune.allocation.Evolution", lambda: small)
    monkeypatch.setattr("leanmoe.prune.run.ALLOCATION_TOKENS", 300)
    settings = PruneSettings(
        "reference", keep="50%", tokens=1024, as_plan=True, allocation="evoesap"
    )
    pruned = prune(settings, tmp_path, "leanmoe prune reference")
    counts = [len(experts) for experts in pruned.kept]
    assert sum(counts) == 6 * 32
    plan = Plan.load(tmp_path / "plan.json")
    assert pruned.output == tmp_path / "plan.json"
    assert plan.provenance["allocation"]["counts"] == counts
    assert plan.provenance["allocation"]["fitness"] >= plan.provenance["allocation"]["even_fitness"]


def test_a_local_folder_is_its_own_checkpoint(tmp_path: Path) -> None:
    assert checkpoint_folder(str(tmp_path)) == tmp_path
    assert (checkpoint_folder("reference") / "config.json").is_file()
