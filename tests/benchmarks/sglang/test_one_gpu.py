"""The script as a whole, with a stand-in of SGLang in its engines' processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.sglang.one_gpu import EMPTY, STOCK, Child, lines, plans_of, prefill_lines
from leanmoe.core.errors import LeanMoeError
from leanmoe.plan import Fingerprint, Rule

FAKE = Path(__file__).parent / "fake"
ROOT = Path(__file__).parents[3]
MODEL = Fingerprint("Model", 1, 2, 64, 8)


def environment() -> dict[str, str]:
    return {"PYTHONPATH": os.pathsep.join([str(FAKE), str(ROOT), str(ROOT / "src")])}


def test_one_call_measures_all_plans(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable, "-m", "benchmarks.sglang.one_gpu", "--shape", "tiny",
            "--parts", "measure", "--loads", "1,8", "--rounds", "2", "--prompts", "64",
            "--paper", "2",
            "--plans", "k=6: top_k=6; shared: guaranteed=3", "--seconds", "100",
            "--output", str(tmp_path),
        ],
        env=os.environ | environment(), cwd=ROOT, capture_output=True, text=True, timeout=120,
        check=True,
    )  # fmt: skip
    (path,) = tmp_path.glob("*-sglang-tiny.json")
    found = json.loads(path.read_text())
    assert found["is_complete"]
    assert "nobody releases" in found["note"]
    assert [e["plan"] for e in found["lines"][:4]] == [STOCK, EMPTY, "k=6", "shared"]
    assert len(found["lines"]) == 2 * 2 * 4
    assert found["lines"][0]["step_ms"]["n"] == 2
    assert found["lines"][1]["gain_step_ms"]["median"] == 1
    assert [e["plan"] for e in found["prefill"]] == [STOCK, EMPTY, "k=6", "shared"]
    assert [e["plan"] for e in found["measured"]["padding"]] == ["shared"]
    assert found["measured"]["padding"][0]["steps_of_7"] > 0
    assert len(found["measured"]["paper"]) == 4
    assert "failures" not in found
    assert "uniform routing: step_ms" in done.stdout


def test_an_engine_that_dies_or_hangs_is_a_failure_with_its_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    died = Child(tmp_path, "died", {"do": "tokens", "settings": {"not a name": 1}}, {})
    ended = died.wait(time.monotonic() + 60)
    assert ended.answer == {"start_s": ended.answer["start_s"]}
    assert "KeyError: 'loads'" in str(ended.failure)
    hangs = Child(tmp_path, "hangs", {"do": "tokens", "settings": {}}, {})
    assert "its time was over" in str(hangs.wait(0).failure)


def test_plans_are_bands_of_rules() -> None:
    plans = plans_of(MODEL, "banded: 8 top_k=4 | guaranteed=3; budget: budget=3/8")
    assert list(plans) == [STOCK, EMPTY, "banded", "budget"]
    assert plans["banded"].rules_for(8) == (Rule(top_k=4),) * 2
    assert plans["banded"].rules_for(9) == (Rule(guaranteed=3),) * 2
    assert plans["budget"].rules_for(1) == (Rule(budget=24),) * 2
    assert plans[EMPTY].is_empty
    with pytest.raises(LeanMoeError, match="top_k is 9"):
        plans_of(MODEL, "many: top_k=9")


def test_gains_are_paired_by_round() -> None:
    points = [
        {"round": n, "routing": "uniform", "requests": 4, "plan": plan, "step_ms": ms}
        for n, plan, ms in [(0, "k=4", 2.0), (0, STOCK, 4.0), (1, STOCK, 6.0), (1, "k=4", 3.0)]
    ]
    stock, few = lines(points, [STOCK, "k=4"])
    assert (stock["plan"], few["plan"]) == (STOCK, "k=4")
    assert few["gain_step_ms"] == {"median": 2.0, "low": 2.0, "high": 2.0, "n": 2}
    prompts = [
        {"round": n, "tokens": 64, "plan": plan, "prompt_ms": ms}
        for n, plan, ms in [(0, STOCK, 99.0), (0, "k=4", 1.0), (1, STOCK, 4.0), (1, "k=4", 2.0)]
    ]
    assert [entry["gain"] for entry in prefill_lines(prompts)] == [1.0, 2.0]
