"""Tasks of lm-evaluation-harness: its own answers under an empty plan, no network needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from leanmoe.core.errors import LeanMoeError
from leanmoe.eval.harness import Answers, judged, loss_changes, right_or_wrong
from leanmoe.eval.settings import EvalSettings
from tests.eval.test_run import NOUNS, leanmoe, write_tasks

WHY = "lm-evaluation-harness is not installed here: pip install 'leanmoe[eval]'"


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task with choices and one of replies, on files of our own."""
    pytest.importorskip("lm_eval", reason=WHY)
    return write_tasks(tmp_path_factory.mktemp("tasks"))


def test_tasks_of_ones_own_from_the_command_line(
    tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["eval", "reference", "--tasks", "things,replies", "--include-path", str(tasks)]
    arguments += ["--rule", "top_k=2", "--concurrency", "2", "-o", str(tmp_path / "run")]
    assert leanmoe(*arguments) == 0
    said = capsys.readouterr()
    assert "things: 12 questions show no loss below" in said.err
    rows = json.loads((tmp_path / "run" / "results.json").read_text())["tasks"]
    assert [row["task"] for row in rows] == ["things", "replies", "all questions", "mean of tasks"]
    assert rows[0]["items"] == 12


def test_an_unknown_task_and_data_out_of_reach_are_said(
    tasks: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = ["--rule", "top_k=2", "-o", str(tmp_path / "run")]
    assert leanmoe("eval", "reference", "--tasks", "winogrand", *run) == 1
    assert "did you mean winogrande" in capsys.readouterr().err
    (tasks / "gone.yaml").write_text(
        "task: gone\ndataset_path: json\ndataset_kwargs:\n  data_files:\n"
        "    test: /nowhere.jsonl\ntest_split: test\ndoc_to_text: q\ndoc_to_target: q\n"
        "output_type: generate_until\nmetric_list:\n  - metric: exact_match\n"
    )
    (tasks / "unnamed.yaml").write_text("task: null\n")
    own = ["--include-path", str(tasks), "--overwrite", *run]
    assert leanmoe("eval", "reference", "--tasks", "nothing", *own) == 1
    assert capsys.readouterr().err.count("\n") == 1
    (tasks / "unnamed.yaml").unlink()
    given = ["--tasks", "gone", "--include-path", str(tasks), "--overwrite", *run]
    assert leanmoe("eval", "reference", *given) == 1
    said = capsys.readouterr().err
    assert "could not be fetched" in said
    assert "--include-path FOLDER" in said


@pytest.fixture(scope="module")
def hub_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A HF_HOME in which ARC-Challenge stands as `datasets` keeps it, with questions of our own."""
    pytest.importorskip("lm_eval", reason=WHY)
    from datasets import Dataset, DatasetInfo, SplitInfo
    from datasets.arrow_writer import ArrowWriter
    from datasets.splits import SplitDict

    home = tmp_path_factory.mktemp("home")
    folder = home / "datasets/allenai___ai2_arc/ARC-Challenge/0.0.0" / ("0" * 40)
    folder.mkdir(parents=True)
    choices = {"text": ["big", "small", "old"], "label": ["A", "B", "C"]}
    questions = Dataset.from_list(
        [
            {"id": n, "question": f"What is a {n}?", "choices": choices, "answerKey": "ABC"[k % 3]}
            for k, n in enumerate(NOUNS)
        ]
    )
    splits = SplitDict(dataset_name="ai2_arc")
    for split in ("train", "validation", "test"):
        file = folder / f"ai2_arc-{split}.arrow"
        with ArrowWriter(path=str(file), features=questions.features) as writer:
            for question in questions:
                writer.write(question)
            count, size = writer.finalize()
        splits[split] = SplitInfo(split, size, count, dataset_name="ai2_arc")
    DatasetInfo(
        features=questions.features, builder_name="parquet", dataset_name="ai2_arc",
        config_name="ARC-Challenge", version="0.0.0", splits=splits,
    ).write_to_directory(str(folder))  # fmt: skip
    return home


TWO_RUNS = """
import sys
from leanmoe.cli import main
for tasks in ("arc_challenge", "arc_challenge,boolq"):
    try:
        main(["eval", "reference", "--rule", "top_k=2", "--tasks", tasks, "-o", sys.argv.pop()])
    except SystemExit as stopped:
        print("ended with", stopped.code or 0, file=sys.stderr)
"""


def test_without_a_network_a_filled_cache_serves_the_harness_own_tasks(
    hub_cache: Path, tmp_path: Path
) -> None:
    """In a process of its own: where the cache is, is read as Hugging Face's packages load."""
    offline = {"HF_HOME": str(hub_cache), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", TWO_RUNS, str(tmp_path / "second"), str(tmp_path / "first")],
        capture_output=True, text=True, check=False, env=os.environ | offline,
    )  # fmt: skip
    rows = json.loads((tmp_path / "first" / "results.json").read_text())["tasks"]
    assert [(row["task"], row["items"]) for row in rows] == [("arc_challenge", 12)]
    lines = done.stderr.splitlines()
    assert [line for line in lines if line.startswith("ended")] == ["ended with 0", "ended with 1"]
    (said,) = [line for line in lines if line.startswith("leanmoe:")]
    assert "the data set of task boolq could not be fetched" in said
    assert "set HF_HOME to a filled cache" in said
    assert "--include-path FOLDER" in said
    assert "Traceback" not in done.stderr


def test_only_what_is_right_or_wrong_is_compared() -> None:
    replies = [(-1.0, True), (-2.5, False)]
    samples = [
        {"doc_id": 1, "filter": "a", "metrics": ["acc"], "acc": 0.0, "target": 1},
        {"doc_id": 0, "filter": "a", "metrics": ["acc"], "acc": 1.0, "target": "0"},
        {"doc_id": 0, "filter": "b", "metrics": ["acc"], "acc": 0.0, "target": 1},
    ]
    scored = [{**sample, "filtered_resps": replies} for sample in samples]
    assert judged("x", scored, "acc") == {
        "right": [1, 0], "scores": [[-1.0, -2.5]] * 2, "loss": [1.0, 2.5],
    }  # fmt: skip
    unnumbered = [{**sample, "target": "a word"} for sample in scored]
    assert judged("x", unnumbered, "acc")["loss"] is None
    written = [{**sample, "filtered_resps": ["a reply"]} for sample in samples]
    assert judged("x", written, "acc") == {"right": [1, 0], "scores": None, "loss": None}
    with pytest.raises(LeanMoeError, match=r"judged by bleu, which is 0\.3"):
        right_or_wrong("x", [{"doc_id": 0, "bleu": 0.3}], "bleu")


def answers(loss_U: np.ndarray) -> Answers:
    return Answers(np.ones(len(loss_U), dtype=bool), loss_U)


def test_the_change_is_that_of_the_mean_over_batch_draws() -> None:
    full = np.linspace(1.0, 2.0, 40)
    draws = [answers(full * 1.02), answers(full * 1.04)]
    found = loss_changes(answers(full), draws, EvalSettings("reference"))
    assert found is not None
    assert found.ratio == pytest.approx(0.03)


def test_too_few_questions_and_unknown_losses_give_no_change() -> None:
    few = answers(np.ones(19))
    assert loss_changes(few, [few], EvalSettings("reference")) is None
    unknown = Answers(np.ones(40, dtype=bool), None)
    assert loss_changes(unknown, [unknown], EvalSettings("reference")) is None
