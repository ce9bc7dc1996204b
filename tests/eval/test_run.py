"""`leanmoe eval` on the reference model, very small: what it leaves, and what stops it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from leanmoe.cli import main
from leanmoe.eval import harness, harness_tasks
from leanmoe.eval import run as run_module
from leanmoe.models.shape import read_shape
from leanmoe.plan import Band, Plan, Rule

NOUNS = (
    *("cat", "dog", "king", "queen", "ship", "tree"),
    *("river", "song", "letter", "garden", "window", "table"),
)


def leanmoe(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    return int(stopped.value.code or 0)


def write_lines(path: Path, values: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def write_tasks(folder: Path) -> Path:
    """Task files "things" and "replies" with their data, in a folder."""
    questions = [
        {
            "q": f"The {n} is",
            "choices": ["big", "small", f"a {n} and no other thing"],
            "gold": k % 3,
        }
        for k, n in enumerate(NOUNS)
    ]
    data = write_lines(folder / "things.jsonl", questions)
    common = (
        f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {data}\n"
        "test_split: test\ndoc_to_text: '{{q}}'\n"
    )
    (folder / "things.yaml").write_text(
        f"task: things\n{common}output_type: multiple_choice\ndoc_to_target: '{{{{gold}}}}'\n"
        "doc_to_choice: '{{choices}}'\nmetric_list:\n  - metric: acc\n"
    )
    (folder / "replies.yaml").write_text(
        f"task: replies\n{common}output_type: generate_until\ndoc_to_target: '{{{{choices[0]}}}}'\n"
        "generation_kwargs:\n  until: ['.']\n  max_gen_toks: 4\n"
        "metric_list:\n  - metric: exact_match\n    aggregation: mean\n    higher_is_better: true\n"
    )
    (folder / "pages.yaml").write_text(
        f"task: pages\n{common.replace('{{q}}', '')}output_type: loglikelihood_rolling\n"
        "doc_to_target: '{{q}}'\nmetric_list:\n  - metric: word_perplexity\n"
    )
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Task files, prompts and texts of our own making."""
    folder = write_tasks(tmp_path_factory.mktemp("data"))
    write_lines(
        folder / "prompts.jsonl",
        [{"prompt": f"The {n} and the", "answer": n, "pattern": r"\w+"} for n in NOUNS],
    )
    for name, words in (("old", "thou hast seen the "), ("new", "call the function with a ")):
        lines = [{"text": f"{k} {n}: " + (words + f"{n} and {NOUNS[k % 12]} {k}. ") * 12}
                 for k, n in enumerate(NOUNS * 8)]  # fmt: skip
        write_lines(folder / f"{name}.jsonl", lines)
    return folder


SMALL = ("--tasks", "things,replies", "--margin", "5", "--concurrency", "4")
PLANS = ("--rule", "top_k=4,renormalise=0", "--rule", "guaranteed=2", "--batch-draws", "2")


def asked(data: Path, output: Path) -> list[str]:
    return [
        *("eval", "reference", *PLANS, *SMALL, "--include-path", str(data), "-o", str(output)),
        *("--prompts", str(data / "prompts.jsonl"), "--output-len", "8", "--samples", "2"),
        *("--domain", f"old={data / 'old.jsonl'}", "--domain", f"new={data / 'new.jsonl'}"),
        *("--calibrate", "activate-count:50%", "--domain-tokens", "6000"),
    ]


def _interrupt(*_arguments: Any, **_settings: Any) -> None:
    raise KeyboardInterrupt


def _never(*_arguments: Any, **_settings: Any) -> None:
    raise AssertionError("a step that is stored ran again")


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that was interrupted on its way."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "domain_matrix", _interrupt)
        assert leanmoe(*asked(data, folder)) == 130
    assert not (folder / "results.json").exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, "_answers", _never)
        assert leanmoe(*asked(data, folder), "--json") == 0
    return folder


def results_of(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "results.json").read_text())
    return found


def test_every_task_is_paired_and_pooled(run: Path) -> None:
    found = results_of(run)
    assert found["provenance"]["versions"]["torch"]
    rows = {(row["plan"], row["task"]): row for row in found["tasks"]}
    assert len(rows) == 2 * (2 + 2)
    sizes = {task: row["items"] for (plan, task), row in rows.items() if plan == "guaranteed=2"}
    assert sizes == {"things": 12, "replies": 12, "all questions": 24, "mean of tasks": 24}
    for row in rows.values():
        assert row["difference"] == pytest.approx(row["accuracy"] - row["full"])
        assert row["low"] <= row["lower_bound"] <= row["difference"] <= row["high"]
        assert row["verdict"]["sharing"] > 1, "verdicts of a run share the error"
        assert row["lower_bound"] >= -0.05 or not row["verdict"]["accepted"]
    assert rows["guaranteed=2", "things"]["mixes"] == 2
    assert rows["top_k=4,renormalise=0", "things"]["mixes"] == 1


def test_replies_are_judged(run: Path) -> None:
    found = results_of(run)["generation"]
    assert (found["prompts"], found["tokens"], found["samples"]) == (12, 8, 2)
    for row in found["rows"]:
        assert 0 <= row["agreement"]["same"] <= 1
        assert all(part["mean"] > 0 for part in row["divergence"]["parts"])
        assert [entry["n"] for entry in row["pass_at"]] == [1, 2]
        assert (row["finished"]["prompts"], row["finished"]["most"]) == (12, 8)
        assert row["finished"]["ratio"] is None, "12 prompts are too few for an interval"
        assert all(e["full"] <= 1 and e["low"] <= e["mean"] <= e["high"] for e in row["pass_at"])


def test_the_matrix_has_a_row_for_each_plan_and_each_domain_calibrated_on(run: Path) -> None:
    found = results_of(run)["domains"]
    assert [domain["name"] for domain in found["domains"]] == ["old", "new"]
    names = [row["plan"] for row in found["rows"]]
    assert names[:2] == ["top_k=4,renormalise=0", "guaranteed=2"]
    assert names[2:] == [f"activate-count 50%, calibrated on {name}" for name in ("old", "new")]
    for row in found["rows"]:
        assert set(row["loss"]) == {"old", "new"}


def test_the_page_shows_every_table(run: Path) -> None:
    page = (run / "report.html").read_text()
    for words in ("Tasks", "Greedy replies", "Answers in replies", "Domains", "How this was made"):
        assert words in page
    assert "<script" not in page


def test_another_plan_is_added_without_asking_the_rest_again(
    run: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.glob("harness-*.json")}
    assert leanmoe(*asked(data, run), "--rule", "top_k=7") == 0
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert {"top_k=7", "guaranteed=2"} <= {row["plan"] for row in results_of(run)["tasks"]}
    assert "show no loss below" in capsys.readouterr().err


def test_a_plan_equal_to_the_model_changes_nothing(data: Path, tmp_path: Path) -> None:
    """So that a difference comes from the plan and not from how it is measured."""
    arguments = ["eval", "reference", "--tasks", "things", "--include-path", str(data)]
    arguments += ["--rule", "top_k=8", "-o", str(tmp_path / "run")]
    assert leanmoe(*arguments) == 0
    for row in results_of(tmp_path / "run")["tasks"]:
        assert (row["lost"], row["gained"], row["difference"]) == (0, 0, 0)


def _wrong_plan(tmp: Path) -> tuple[str, ...]:
    from dataclasses import replace

    fingerprint = replace(read_shape("reference").fingerprint(), experts=32)
    Plan.uniform(fingerprint, Rule(top_k=4)).save(tmp / "p.json")
    return ("--plan", str(tmp / "p.json"))


def _idle_plan(tmp: Path) -> tuple[str, ...]:
    fingerprint = read_shape("reference").fingerprint()
    rules = (Rule(top_k=4),) * fingerprint.moe_layers
    Plan.banded(fingerprint, (Band(8, rules),)).save(tmp / "p.json")
    return ("--plan", str(tmp / "p.json"), "--concurrency", "32")


def _few_prompts(tmp: Path) -> tuple[str, ...]:
    path = write_lines(tmp / "p.jsonl", [{"prompt": "one"}] * 3)
    return ("--rule", "top_k=4", "--tasks", "none", "--prompts", str(path))


MISTAKES: dict[str, tuple[Callable[[Path], tuple[str, ...]], str]] = {
    "no plan": (lambda _: (), "give --plan or --rule"),
    "another model's plan": (_wrong_plan, "experts"),
    "a plan that does nothing": (_idle_plan, "runs the full model in steps of 32 tokens"),
    "a rule": (lambda _: ("--rule", "topk=4"), "did you mean top_k"),
    "a rule's value": (lambda _: ("--rule", "top_k=99"), "must be 1 to 8"),
    "a plan twice": (
        lambda _: ("--rule", "top_k=4", "--rule", "top_k=4"), "another variant is called top_k=4"),
    "margin": (lambda _: ("--rule", "top_k=4", "--margin", "much"), "percentage points"),
    "engine": (lambda _: ("--rule", "top_k=4", "--engine", "sgl"), "transformers, vllm, sglang"),
    "nothing for vllm": (lambda _: ("--rule", "top_k=4", "--engine", "vllm"), "none is asked for"),
    "replies in vllm": (
        lambda _: ("--rule", "top_k=4", "--engine", "vllm", "--prompts", "x.jsonl"),
        "--prompts needs --engine transformers"),
    "no folder": (lambda _: ("--rule", "top_k=4", "--include-path", "/nowhere"), "is no folder"),
    "few prompts": (_few_prompts, "at least 10"),
    "domain": (lambda _: ("--rule", "top_k=4", "--domain", "x"), "NAME=FILE"),
    "calibrate": (lambda _: ("--rule", "top_k=4", "--calibrate", "reap:50%"), "none is given"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line(
    mistake: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, message = MISTAKES[mistake]
    given = arguments(tmp_path)
    tasks = () if "--tasks" in given else ("--tasks", "none")
    assert leanmoe("eval", "reference", *given, *tasks, "-o", str(tmp_path / "run")) == 1
    said = capsys.readouterr().err.strip()
    assert message in said
    assert len([line for line in said.splitlines() if line.startswith("leanmoe:")]) == 1
    assert "Traceback" not in said


def test_a_perplexity_task_is_left_out_and_the_rest_is_delivered(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ("eval", "reference", "--rule", "top_k=4", "--include-path", str(data))
    alone = (*common, "--tasks", "pages", "-o", str(tmp_path / "alone"))
    assert leanmoe(*alone) == 1
    line = "task pages is a perplexity of texts, no questions: give them as --domain NAME=FILE"
    assert line in capsys.readouterr().err
    assert leanmoe(*common, "--tasks", "pages,things", "-o", str(tmp_path / "both")) == 0
    assert f"{line}; it is left out" in capsys.readouterr().err
    assert {row["task"] for row in results_of(tmp_path / "both")["tasks"]} == {"things"}


def test_without_the_harness_its_tasks_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness_tasks, "find_spec", lambda _name: None)
    assert leanmoe("eval", "reference", "--rule", "top_k=4", "-o", str(tmp_path / "run")) == 1
    said = capsys.readouterr().err
    assert "arc_challenge" in said
    assert "leanmoe[eval]" in said
