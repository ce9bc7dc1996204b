"""The public names: each verb is a function, whichever module was imported first."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import leanmoe
from leanmoe.core.errors import LeanMoeError

VERBS = ("bench", "evaluate", "predict", "prune", "tune")


@pytest.mark.parametrize(
    "first",
    [
        "import leanmoe",
        "import leanmoe.tune.settings, leanmoe.bench.settings, leanmoe.prune.settings",
        "import leanmoe.predict.run, leanmoe.eval.settings",
        "from leanmoe import tune, bench, predict, prune",
    ],
)
def test_verbs_can_be_called_whatever_was_imported_first(first: str) -> None:
    code = (
        f"{first}\nimport sys, leanmoe\n"
        f"assert all(callable(getattr(leanmoe, verb)) for verb in {VERBS})\n"
        "import leanmoe.tune.settings\nassert callable(leanmoe.tune)\n"
        "assert leanmoe.predict('reference', top_k=6, concurrency=8).predictions[0].gain > 0\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)


def test_every_public_name_is_there() -> None:
    assert all(getattr(leanmoe, name) for name in leanmoe.__all__)
    with pytest.raises(AttributeError, match="no attribute 'tunes'"):
        leanmoe.tunes  # noqa: B018


def test_keywords_are_flags_and_take_their_words() -> None:
    one = leanmoe.predict("reference", top_k=6, concurrency=(1, 8), input_len="64")
    other = leanmoe.predict("reference", top_k=6, concurrency="1,8", input_len=64)
    assert one.to_json() == other.to_json()


def test_a_keyword_that_is_none_is_named_with_near_ones(tmp_path: Path) -> None:
    with pytest.raises(LeanMoeError, match=r"setting 'marign' .*: did you mean margins\?"):
        leanmoe.tune("reference", output=tmp_path, marign=0.01)
    with pytest.raises(LeanMoeError, match="0 models were given"):
        leanmoe.bench(output=tmp_path)


def test_prune_gives_a_typed_result_and_says_the_call(tmp_path: Path) -> None:
    out = tmp_path / "out"
    pruned = leanmoe.prune("reference", output=str(out), criterion="even", keep=48, as_plan=True)
    assert pruned.output == out / "plan.json"
    assert all(len(layer) == 48 for layer in pruned.kept)
    command = leanmoe.Plan.load(pruned.output).provenance["provenance"]["command"]
    assert command == "leanmoe.prune('reference', criterion='even', keep=48, as_plan=True)"


def test_a_uniform_plan_of_a_model_by_name() -> None:
    plan = leanmoe.Plan.uniform("reference", leanmoe.Rule(top_k=6))
    assert plan.bands[0].rules == (leanmoe.Rule(top_k=6),) * plan.model.moe_layers
