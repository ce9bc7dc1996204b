"""Who agrees with the first run, and what a later run takes from it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from benchmarks.common.results import RESULTS
from benchmarks.statistics.busy_verdicts import (
    Verdicts,
    agreement,
    beside,
    copy_losses,
    demo_options,
)
from leanmoe.results.tune import TuneResults

FIRST = Verdicts(False, 1.0, {1: True, 8: False}, {1: "a", 8: ""}, {1: (1.1, 1.2)})


def test_runs_agree_at_every_load_or_at_some() -> None:
    runs = [
        FIRST,
        replace(FIRST, plans={1: "b", 8: ""}),
        replace(FIRST, accepted={1: True, 8: True}),
        replace(FIRST, accepted={1: False, 8: True}),
    ]
    assert agreement(FIRST, runs) == {
        "runs": 4,
        "verdicts": 2,
        "verdicts_and_plans": 1,
        "verdicts_by_load": {1: 3, 8: 2},
    }


def test_verdicts_are_those_of_a_results_file() -> None:
    demo = sorted(RESULTS.glob("*-demo.json"))[0]
    results = TuneResults.load(demo)
    found = Verdicts.of(results, True, 2.0)
    assert found.accepted == {each.concurrency: each.accepted for each in results.verdicts}
    assert {load for load, plan in found.plans.items() if plan} >= {
        load for load, accepted in found.accepted.items() if accepted
    }
    assert found.to_json()["seconds"] == 2.0


def test_a_later_run_takes_losses_and_no_time(tmp_path: Path) -> None:
    source, target = tmp_path / "first", tmp_path / "next"
    source.mkdir()
    kept = {"settings.json", "profile.json", "validation-code-any-0.json", "sensitivity-1.json"}
    for name in {*kept, "gain-8-0.json", "layer-times-decode-8.json", "results.json", "plan.json"}:
        (source / name).write_text("{}")
    copy_losses(source, target)
    assert {file.name for file in target.iterdir()} == kept


def test_the_demo_is_the_makefiles() -> None:
    name, *options = demo_options()
    assert name == "reference"
    assert "--heldout-tokens" in options
    assert "--overwrite" not in options


def test_a_busy_process_ends_with_its_run() -> None:
    with beside(True) as process:
        assert process is not None
        assert process.poll() is None
    assert process.returncode is not None
    with beside(False) as none:
        assert none is None
