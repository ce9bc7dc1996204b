"""What is compared of engines' tokens, and when it holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.sglang import check
from benchmarks.sglang.settings import CHECKED
from leanmoe.core.files import write_json
from leanmoe.plan import Plan


def answers(**tokens: list[list[list[int]]]) -> dict[str, dict[str, Any]]:
    """By engine; all others answer as stock does."""
    stock = [[[1, 2], [3, 4]]] * 2
    engines = {name for pair in check.PAIRS + check.SHOWN for name in pair}
    loads = [str(load) for load in check.LOADS]
    found = {name: {"tokens": dict.fromkeys(loads, stock)} for name in engines}
    replies = {name.replace("_", " "): each for name, each in tokens.items()}
    return found | {name: {"tokens": dict.fromkeys(loads, each)} for name, each in replies.items()}


def holds(found: list[dict[str, Any]], ours: str) -> set[Any]:
    return {each["holds"] for each in found if each["pair"][0] == ours and each["ran"]}


def test_equal_tokens_hold_and_others_do_not() -> None:
    assert holds(check.verdicts(answers()), "empty plan") == {True}
    found = check.verdicts(answers(empty_plan=[[[1, 2], [3, 9]]] * 2))
    assert holds(found, "empty plan") == {False}
    assert holds(found, "sharing") == {None}


def test_what_stock_does_not_say_twice_is_noise() -> None:
    noisy = [[[1, 2], [3, 4]], [[1, 2], [3, 5]]]
    found = check.verdicts(answers(stock=noisy, empty_plan=[[[1, 2], [3, 6]]] * 2))
    assert holds(found, "empty plan") == {True}
    damaged = check.verdicts(answers(stock=noisy, empty_plan=[[[9, 2], [3, 6]]] * 2))
    assert holds(damaged, "empty plan") == {False}


def test_an_engine_that_did_not_answer_is_no_verdict() -> None:
    found = answers()
    found["override"] = {}
    missing = [each for each in check.verdicts(found) if "override" in each["pair"]]
    assert [each["ran"] for each in missing] == [False] * len(check.LOADS)


def test_nan_is_in_odd_experts_alone() -> None:
    names = [f"model.layers.0.mlp.experts.{n}.up_proj.weight" for n in range(4)] + ["lm_head"]
    found = check.with_nan({name: torch.ones(2) for name in names})
    assert [bool(found[name].isnan().all()) for name in names] == [False, True, False, True, False]
    with pytest.raises(KeyError, match="no expert by its number"):
        check.with_nan({"model.layers.0.mlp.experts.gate_up_proj": torch.ones(2)})


def test_each_engine_is_asked_with_its_own_plan_and_ports(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", CHECKED)
    engines = check.engines(tmp_path)
    models = {False: tmp_path, True: tmp_path / check.NAN}
    requests = [check.request(each, models, place) for place, each in enumerate(engines)]
    assert len({each["settings"]["nccl_port"] for each in requests}) == len(engines)
    damaged = [each for each in requests if each["settings"]["model_path"].endswith(check.NAN)]
    assert len(damaged) == 1
    for each in engines:
        variables = check.environment(each, tmp_path)
        plans = [Plan.load(Path(path)) for path in variables.values()]
        assert plans == ([] if each.plan is None else [each.plan])
