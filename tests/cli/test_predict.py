"""`leanmoe predict` and `study` from the command line."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from leanmoe.models.catalog import CONFIGS
from leanmoe.models.shape import read_shape
from leanmoe.plan import Plan, Rule
from tests.cli.test_main import run
from tests.profile.example import made_up_profile

SMALL = ["--concurrency", "8", "--input-len", "256", "--output-len", "32"]


def test_json_of_a_plan_on_a_machine(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["predict", "Qwen/Qwen3-30B-A3B", "--guaranteed", "3", *SMALL, "--json"]
    code, out, _ = run(capsys, *command)
    assert code == 0
    (found,) = json.loads(out)
    assert found["label"] == "modelled"
    assert found["gain"] > 1.1
    assert found["plan"]["distinct"] < found["full"]["distinct"]
    assert set(found["stands_on"]) == {
        "experts",
        "experts have been off by",
        "other parts",
        "distinct experts",
    }
    assert found["full"]["step_ms"]["experts"] > 0
    assert found["full"]["bounds"]["experts"] in ("memory", "compute", "latency")


def test_the_table_says_what_it_stands_on(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "predict", "reference", "--top-k", "6", *SMALL)
    assert code == 0
    words = " ".join(out.split())
    for part in (
        "Modelled; active",
        "experts have been off by:",
        "gain",
        "expect more",
        "independent",
    ):
        assert part in words


def test_poisson_arrivals(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["predict", "Qwen/Qwen3-30B-A3B", "--request-rate", "4", *SMALL[2:], "--json"]
    code, out, _ = run(capsys, *command)
    assert code == 0
    assert json.loads(out)[0]["full"]["simulated"]["left"] < 20


def test_a_sweep_with_its_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "sweep.html"
    command = ["predict", "deepseek-ai/DeepSeek-V3", "--top-k", "6", "--gpus", "8,16", "--sweep"]
    code, out, _ = run(capsys, *command, "--tpot", "40", "--price", "2", "-o", str(page))
    assert code == 0
    words = " ".join(out.split())
    assert "Cheapest, plan:" in words
    assert "GPUs make the tokens that take the full model 64" in words
    text = page.read_text()
    assert "<script src" not in text
    assert "The cheapest deployment within the limits" in text


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--gpu", "h2000"], "hardware 'h2000' is not known: did you mean h200"),
        (["--gpus", "1"], "GB short in all"),
        (["--tensor-parallel-size", "3"], "--tensor-parallel-size 3 does not divide"),
        (
            ["--tensor-parallel-size", "8", "--expert-parallel-size", "3"],
            "--tensor-parallel-size x --data-parallel-size: it must be one of 1, 2, 4, 8",
        ),
        (["--top-k", "9"], "top_k is 9: it must be 1 to 8"),
        (["--concurrency", "x"], "--concurrency is 'x'"),
        (["--concurrency", "0"], "each must be 1 or more"),
        (["--request-rate", "1", "--concurrency", "2"], "--request-rate goes with neither"),
        (["--kernel", "mine"], "there are no constants for kernel 'mine'"),
        (["--agreement", "2"], "agreement is 2"),
        (["--output", "x.html"], "go with --sweep"),
        (["--gpus", "8", "--tensor-parallel-size", "4"], "are 4 GPUs, --gpus says 8"),
        (["--constants", "absent.json"], "cannot read constants"),
        (["--plan", "absent.json"], "cannot read plan"),
        (["--plan", "absent.json", "--top-k", "4"], "not both"),
    ],
)
def test_bad_input_is_one_line(
    capsys: pytest.CaptureFixture[str], options: list[str], says: str
) -> None:
    code, out, err = run(capsys, "predict", "deepseek-ai/DeepSeek-V3", *options)
    assert code == 1
    assert out == ""
    assert says in err
    assert len([line for line in err.splitlines() if line.startswith("leanmoe: ")]) <= 2


@pytest.mark.parametrize("verb", ["predict", "inspect"])
def test_a_name_that_is_mistyped_gets_a_suggestion(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    code, _, err = run(capsys, verb, "deepseek-ai/DeepSek-V3")
    assert (code, err.count("\n")) == (1, 1)
    assert "did you mean deepseek-ai/DeepSeek-V3" in err


def test_a_plan_of_another_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plan.json"
    Plan.uniform(read_shape("reference").fingerprint(), Rule(top_k=4)).save(path)
    code, _, err = run(capsys, "predict", "deepseek-ai/DeepSeek-V3", "--plan", str(path))
    assert code == 1
    assert "this plan was made for another model" in err


def test_a_budget_per_rank_and_whose_tokens_spend_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ranks that decide alone activate other experts, more in all; their steps take longer."""
    path = tmp_path / "plan.json"
    name = "Qwen/Qwen3-30B-A3B"
    Plan.uniform(read_shape(CONFIGS[name]).fingerprint(), Rule(budget_per_rank=12)).save(path)
    spread = [
        "--tensor-parallel-size",
        "1",
        "--data-parallel-size",
        "2",
        "--expert-parallel-size",
        "2",
        "--concurrency",
        "32",
        "--json",
    ]
    command = ["predict", name, "--plan", str(path), *SMALL[2:], *spread]
    found = {}
    for scope in ("rank", "all"):
        code, out, _ = run(capsys, *command, "--batch-scope", scope)
        assert code == 0
        found[scope] = json.loads(out)[0]["plan"]
    assert 24 <= found["all"]["distinct"] < 0.7 * found["rank"]["distinct"]
    steps = {scope: each["step_ms"] for scope, each in found.items()}
    assert steps["all"]["experts"] < steps["rank"]["experts"]
    assert steps["all"]["communication"] > steps["rank"]["communication"]
    code, _, _ = run(capsys, "predict", name, "--plan", str(path), *SMALL, "--sweep", "--gpus", "2")
    assert code == 0
    code, _, err = run(capsys, *command, "--batch-scope", "some")
    assert code != 0
    assert "some" in err


def test_a_profile_is_replayed_under_the_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = made_up_profile(alike=1.0)
    saved.save(tmp_path / "profile")
    config: dict[str, Any] = {
        **CONFIGS["Qwen/Qwen3-30B-A3B"],
        "architectures": [saved.model.architecture],
        "num_hidden_layers": 3,
        "mlp_only_layers": [0],
        "num_experts": 16,
        "num_experts_per_tok": 4,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    Plan.uniform(saved.model, Rule(threshold=0.9)).save(tmp_path / "plan.json")
    command = ["predict", str(tmp_path), "--plan", str(tmp_path / "plan.json"), *SMALL, "--json"]
    code, _, err = run(capsys, *command)
    assert code == 1
    assert "give a profile" in err
    code, out, _ = run(capsys, *command, "--profile", str(tmp_path / "profile"))
    assert code == 0
    (found,) = json.loads(out)
    assert "replayed under the plan" in found["stands_on"]["distinct experts"]
    assert found["plan"]["slots"] < 4
    assert asdict(saved.model)["experts"] == 16


def test_the_study_without_quality(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["study", "--quality", "none", "-o", str(tmp_path / "out")]
    code, out, _ = run(capsys, *command)
    assert code == 0
    assert "not tested" in " ".join(out.split())
    results = json.loads((tmp_path / "out/study.json").read_text())
    assert {c["verdict"] for c in results["claims"]} <= {"confirmed", "partly", "not tested"}
    page = (tmp_path / "out/study.html").read_text()
    for part in ("The paper&#39;s claims", "The U: where a lower k gains", "cited"):
        assert part in page
    tuned = ["--tuned", str(tmp_path / "out/study.json"), "-o", str(tmp_path / "x")]
    code, _, err = run(capsys, "study", "--quality", "none", *tuned)
    assert code == 1
    assert "is not the results.json of leanmoe tune" in err
    code, _, err = run(capsys, "study", "--quality", "guessed", "-o", str(tmp_path / "x"))
    assert code == 1
    assert "--quality is 'guessed'" in err
    code, _, err = run(
        capsys, "study", "--quality", str(tmp_path / "out/study.json"), "-o", str(tmp_path / "x")
    )
    assert code == 1
    assert "holds no measured quality" in err
