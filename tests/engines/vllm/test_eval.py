"""`leanmoe eval --engine vllm`: the same questions, answered as Transformers answers them."""

from __future__ import annotations

import json
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

from leanmoe.models.shape import read_shape
from leanmoe.plan import Plan, Rule
from tests.eval.test_run import leanmoe, write_tasks

NEAR = 2e-3
"""Of log-likelihoods in float32: sums in another order, over seven layers."""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed here")
    if not {"leanmoe", "leanmoe_control"} <= entry_points(group="vllm.general_plugins").names:
        pytest.skip("leanmoe is not installed here, so vLLM does not find it: make test-engines")
    return write_tasks(tmp_path_factory.mktemp("tasks"))


def answered(run: Path, engine: str, which: str) -> dict[str, Any]:
    """What a run stored of a plan's answers to "things"."""
    stored = json.loads((run / f"harness-{engine}-{which}-0.json").read_text())
    found: dict[str, Any] = stored["result"]["things"]
    return found


def test_answers_are_those_of_transformers(tasks: Path, tmp_path: Path) -> None:
    plan = Plan.uniform(read_shape("reference").fingerprint(), Rule(top_k=2))
    asked = ["eval", "reference", "--tasks", "things", "--include-path", str(tasks)]
    asked += ["--rule", "top_k=2", "--concurrency", "4", "--dtype", "float32"]
    for engine in ("transformers", "vllm"):
        assert leanmoe(*asked, "--engine", engine, "-o", str(tmp_path / engine)) == 0
    results = json.loads((tmp_path / "vllm" / "results.json").read_text())
    assert results["experts_implementation"].startswith("vllm ")
    (digest,) = [file.stem for file in (tmp_path / "vllm" / "plans").glob("*.json")
                 if not Plan.load(file).is_empty]  # fmt: skip
    assert Plan.load(tmp_path / "vllm" / "plans" / f"{digest}.json").bands == plan.bands
    scores = {}
    for which in ("full", digest):
        ours = answered(tmp_path / "transformers", "transformers", which)
        theirs = answered(tmp_path / "vllm", "vllm", which)
        assert len(theirs["right"]) == 12
        for was, now in zip(ours["scores"], theirs["scores"], strict=True):
            assert now == pytest.approx(was, abs=NEAR)
        assert theirs["right"] == ours["right"]
        scores[which] = theirs["scores"]
    changed = [abs(a - b) for one, other in zip(scores["full"], scores[digest], strict=True)
               for a, b in zip(one, other, strict=True)]  # fmt: skip
    assert max(changed) > 100 * NEAR, "the plan was not at work"
