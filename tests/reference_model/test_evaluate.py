"""The evaluation's arithmetic on cases worked by hand, its input errors, and the card."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from leanmoe.core.files import write_json
from leanmoe.scoring.rows import Score, ScoredRow
from reference_model import task_files, tasks
from reference_model.card import RESULTS, write_card
from reference_model.evaluate import (
    EvaluateSettings,
    Evaluation,
    bits_per_byte,
    evaluate_blimp,
    evaluate_choices,
    evaluate_lambada,
    expert_use,
    main,
    paired_interval,
    share,
)
from reference_model.task_files import Item

LN2 = math.log(2)


class Fixed:
    """A scorer whose answers are given."""

    def __init__(self, scores: list[Score]) -> None:
        self.scores = scores

    def score(self, rows: list[ScoredRow], _what: str) -> list[Score]:
        assert len(rows) == len(self.scores)
        return self.scores


def fixed(*nlls: float, greedy: bool = False) -> Any:
    return Fixed([Score(nll, greedy) for nll in nlls])


ROW = ScoredRow((0, 1))


def test_bits_per_byte_weighs_units_by_their_bytes() -> None:
    nlls, sizes = np.array([10 * LN2, 0.0]), np.array([5.0, 15.0])
    assert bits_per_byte(nlls, sizes) == pytest.approx(0.5)


def test_the_interval_is_paired_and_holds_the_change() -> None:
    sizes = np.full(50, 100.0)
    steady = np.full(50, 10.0)
    low, high = paired_interval(steady, sizes, resamples=200, seed=0)
    assert low == pytest.approx(0.1 / LN2)
    assert high == pytest.approx(0.1 / LN2)
    noisy = steady + np.random.default_rng(0).normal(0, 5, 50)
    low, high = paired_interval(noisy, sizes, resamples=2000, seed=0)
    assert low < noisy.sum() / sizes.sum() / LN2 < high
    # A normal interval for the mean of 50 with this spread.
    assert high - low == pytest.approx(2 * 1.96 * noisy.std() / 50**0.5 / 100 / LN2, rel=0.15)


def test_wilson_interval() -> None:
    found = share(8, 10)
    assert found["accuracy"] == 0.8
    assert (found["low"], found["high"]) == pytest.approx((0.4902, 0.9433), abs=1e-4)


def test_choices_by_byte_and_by_sum() -> None:
    # Summed, the short wrong answer wins; per byte the long right one does.
    question = Item((ROW, ROW), answer_bytes=(4, 20), right=1)
    found = evaluate_choices(fixed(8.0, 10.0), [question], "")
    assert found["summed"]["accuracy"] == 0.0
    assert found["per_byte"]["accuracy"] == 1.0
    assert found["choices"] == 2


def test_blimp_and_lambada() -> None:
    pairs = {"a": [(ROW, ROW), (ROW, ROW)], "b": [(ROW, ROW)]}
    found = evaluate_blimp(fixed(1.0, 2.0, 3.0, 2.0, 1.0, 9.0), pairs, "")
    assert found["paradigms"] == {"a": 0.5, "b": 1.0}
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert evaluate_lambada(fixed(1.0, 1.0, greedy=True), [ROW, ROW], "")["accuracy"] == 1.0


def test_expert_use_of_even_and_dead_experts() -> None:
    even, dead = expert_use(np.array([[5, 5, 5, 5], [10, 10, 0, 0]]))
    assert (even["least"], even["most"], even["unused"]) == (1.0, 1.0, 0)
    assert even["entropy_share"] == pytest.approx(1.0)
    assert (dead["least"], dead["most"], dead["unused"]) == (0.0, 2.0, 2)
    assert dead["entropy_share"] == pytest.approx(0.5)


def write_evaluation_files(folder: Path) -> None:
    for name in tasks.TEXTS.values():
        documents = [f"Document {i} says a little about rain.\n" for i in range(12)]
        (folder / name).write_text("<|endoftext|>\n".join(documents))
    (folder / tasks.TEXTS["wikitext2"]).write_text(" = A title = \n some words \n" * 12)
    (folder / task_files.LAMBADA).write_text('{"text": "He opened the door and closed the door"}\n')
    (folder / task_files.PIQA).write_text(
        '{"goal": "To dry hair", "sol1": "use air", "sol2": "sing"}\n'
    )
    (folder / task_files.PIQA_LABELS).write_text("0\n")
    (folder / task_files.QASC).write_text(
        '{"question": {"stem": "What falls?", "choices": [{"text": "rain", "label": "A"}, '
        '{"text": "roof", "label": "B"}]}, "answerKey": "A"}\n'
    )
    (folder / task_files.BLIMP).mkdir()
    (folder / task_files.BLIMP / "agreement.jsonl").write_text(
        '{"sentence_good": "The cats sleep.", "sentence_bad": "The cats sleeps."}\n'
    )


def test_a_small_evaluation_from_files_to_card(tmp_path: Path) -> None:
    from leanmoe.core.files import read_json
    from leanmoe.models import reference
    from reference_model.scoring import Scorer

    write_evaluation_files(tmp_path)
    results = tmp_path / "results"
    scorer = Scorer(reference.path(), "cpu")
    settings = EvaluateSettings(tokens_per_text=50, resamples=100)
    Evaluation(scorer, tmp_path, results / "evaluation.json", settings).run()
    found = read_json(results / "evaluation.json", "evaluation")
    assert [entry["k"] for entry in found["uniform_k"]] == [8, 7, 6, 5, 4, 3, 2, 1]
    assert found["uniform_k"][0]["texts"]["peps"]["change"] == 0.0
    before = (results / "evaluation.json").read_text()
    again = Evaluation(scorer, tmp_path, results / "evaluation.json", settings)
    assert again.results["uniform_k"] == found["uniform_k"]
    assert again.results["blimp"] == found["blimp"]
    assert (results / "evaluation.json").read_text() == before
    for name in ("training", "data"):
        packaged = RESULTS / f"{name}.json"
        write_json(results / f"{name}.json", read_json(packaged, name))
    write_card(results, tmp_path)
    assert (
        f"{found['texts']['novels']['bits_per_byte']:.4f}" in (tmp_path / "README.md").read_text()
    )
    assert (tmp_path / "loss.svg").read_text().startswith("<svg")


def test_missing_evaluation_files_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="error: evaluation folder"):
        main(["--data", str(tmp_path)])
    assert "Traceback" not in capsys.readouterr().err
