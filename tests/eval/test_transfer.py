"""A finished plan on other text: the run's own test, each kind by itself."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from leanmoe import Plan, Rule
from leanmoe.core.errors import LeanMoeError
from leanmoe.core.schema import all_fields
from leanmoe.eval.transfer import read_run
from leanmoe.models.shape import read_shape
from leanmoe.results.eval import EvalResults
from leanmoe.tune.settings import TuneSettings
from tests.eval.test_run import leanmoe
from tests.report import example

COMMITTED = Path(__file__).parents[2] / "benchmarks" / "results"
DEMO = "2026-11-23-intel-r-xeon-r-processor-demo"
FINGERPRINT = read_shape("reference").fingerprint()


def finished_run(folder: Path, rule: Rule) -> Path:
    """A run of `tune` with a plan of one rule, for prompts of 32 tokens and replies of 4."""
    folder.mkdir()
    settings = TuneSettings("reference", concurrency=(1, 2), input_len=32, output_len=4)
    replace(example.tune_results(), settings=all_fields(settings)).save(folder / "results.json")
    Plan.uniform(FINGERPRINT, rule).save(folder / "plan.json")
    return folder


def texts(folder: Path) -> list[str]:
    asked = []
    for name in ("old", "new"):
        rows = [
            {"text": " ".join(f"the {name} {n} of {m} and {n * m}" for m in range(7))}
            for n in range(24)
        ]
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        asked += ["--domain", f"{name}={path}"]
    return asked


def test_a_plan_is_put_to_its_own_test_on_each_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = finished_run(tmp_path / "tuned", Rule(guaranteed=1))
    out = tmp_path / "out"
    asked = ["--transfer", str(run), *texts(tmp_path), "--tasks", "none", "--domain-tokens", "1150"]
    assert leanmoe("eval", "reference", *asked, "-o", str(out)) == 0
    moved = EvalResults.load(out / "results.json").transfer
    assert moved is not None
    assert [row.concurrency for row in moved.rows] == [1, 2]
    of_two = {each.kind: each for each in moved.rows[1].kinds}
    assert set(of_two) == {"old", "new"}
    assert {each.batch_draws for each in of_two.values()} == {3}
    assert all(each.divergence > 0.01 and each.flips > 0 for each in of_two.values())
    assert all(each.loss.sources == 24 for each in of_two.values())
    assert moved.rows[0].kinds[0].batch_draws == 1, "alone in its step, a request meets nobody"
    assert moved.sharing == 4
    shown = capsys.readouterr().out
    assert "A finished plan on other text, margin 0.5%" in shown
    page = (out / "report.html").read_text()
    assert "A finished plan on other text" in page
    assert "The 4 verdicts are corrected (Holm): all hold together with 95%." in page


def test_a_run_of_0_1_0_is_read_by_its_names_of_then(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_bytes((COMMITTED / f"{DEMO}-plan.json").read_bytes())
    (tmp_path / "results.json").write_bytes((COMMITTED / f"{DEMO}.json").read_bytes())
    read = read_run(tmp_path, FINGERPRINT)
    assert read.settings.concurrency == (1, 8, 32)
    assert (read.settings.input_len, read.settings.output_len) == (256, 8)
    assert str(read.margin) == "0.5%"
    assert not read.plan.plan.is_empty


def test_what_is_no_finished_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LeanMoeError, match="results"):
        read_run(tmp_path, FINGERPRINT)
    empty = finished_run(tmp_path / "empty", Rule())
    with pytest.raises(LeanMoeError, match="is empty: there is nothing to prove"):
        read_run(empty, FINGERPRINT)


def test_a_text_that_is_too_little_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = finished_run(tmp_path / "tuned", Rule(top_k=7))
    short = tmp_path / "short.jsonl"
    short.write_text(json.dumps({"text": " ".join(map(str, range(90)))}) + "\n")
    asked = ("--transfer", str(run), "--domain", f"short={short}", "--tasks", "none")
    assert leanmoe("eval", "reference", *asked, "-o", str(tmp_path / "out")) == 1
    assert "domain short: too few documents" in capsys.readouterr().err
