"""Which tasks are right or wrong is found out on made-up replies, before any model answers."""

from __future__ import annotations

from pathlib import Path

import pytest

from leanmoe.core.errors import LeanMoeError
from leanmoe.eval.harness_tasks import askable_tasks
from leanmoe.eval.settings import EvalSettings
from tests.eval.test_harness import WHY
from tests.eval.test_run import write_tasks

SHARES = """
def share(doc, results):
    best, rest = results[0][0], [score for score, _ in results]
    return {"acc": best / sum(rest)}


def overlap(doc, results):
    said, right = set(results[0].split()), set(doc["choices"][0].split())
    return {"f1": len(said & right) / len(said | right), "em": float(said == right)}


def broken(doc, results):
    raise KeyError("answers")
"""
KINDS = {
    "lambada": "output_type: loglikelihood\ndoc_to_target: ' {{choices[0]}}'\n"
    "metric_list:\n  - metric: perplexity\n  - metric: acc\n",
    "mc2": "output_type: multiple_choice\ndoc_to_target: '{{gold}}'\ndoc_to_choice: '{{choices}}'\n"
    "process_results: !function shares.share\nmetric_list:\n  - metric: acc\n",
    "overlaps": "output_type: generate_until\ndoc_to_target: '{{choices[0]}}'\n"
    "process_results: !function shares.overlap\n"
    "metric_list:\n  - {metric: f1, aggregation: mean, higher_is_better: true}\n"
    "  - {metric: em, aggregation: mean, higher_is_better: true}\n",
    "broken": "output_type: generate_until\ndoc_to_target: '{{choices[0]}}'\n"
    "process_results: !function shares.broken\n"
    "metric_list:\n  - {metric: em, aggregation: mean, higher_is_better: true}\n",
    "brier": "output_type: multiple_choice\ndoc_to_target: '{{gold}}'\n"
    "doc_to_choice: '{{choices}}'\nmetric_list:\n  - metric: brier_score\n",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("lm_eval", reason=WHY)
    made = write_tasks(tmp_path_factory.mktemp("tasks"))
    head = (made / "things.yaml").read_text().split("output_type")[0]
    for name, rest in KINDS.items():
        (made / f"{name}.yaml").write_text(head.replace("task: things", f"task: {name}") + rest)
    (made / "shares.py").write_text(SHARES)
    return made


def asked(folder: Path, *tasks: str) -> EvalSettings:
    return EvalSettings("reference", tasks=tasks, include_path=str(folder))


def test_each_task_is_judged_by_its_first_metric_that_is_right_or_wrong(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("things", "replies", "lambada", "mc2", "overlaps", "broken", "brier", "pages")
    able = askable_tasks(asked(folder, *names))
    assert able.metrics == {
        "things": "acc", "replies": "exact_match", "lambada": "acc", "overlaps": "em",
    }  # fmt: skip
    assert able.settings.tasks == tuple(able.metrics)
    said = capsys.readouterr().err.splitlines()
    left_out = [line for line in said if line.endswith("it is left out")]
    for name, why in (
        ("mc2", "is judged by acc, which is not right or wrong on a question"),
        ("broken", "does not score a reply: 'answers'"),
        ("brier", "is judged by brier_score, which is not"),
        ("pages", "is a perplexity of texts, no questions"),
    ):
        assert [line for line in left_out if f"task {name} {why}" in line]
    assert len(left_out) == 4


def test_where_nothing_is_left_it_is_an_error(folder: Path) -> None:
    with pytest.raises(LeanMoeError, match="task mc2 is judged by acc"):
        askable_tasks(asked(folder, "mc2"))
