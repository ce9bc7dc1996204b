"""`leanmoe serve` and `leanmoe export` up to the point where an engine starts."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from leanmoe.cli import main
from leanmoe.core import installed_sglang, installed_vllm
from leanmoe.core.installed_vllm import VllmInstall
from leanmoe.models.shape import read_shape
from leanmoe.plan import Fingerprint, Level, Plan, Rule

MODEL = read_shape("reference").fingerprint()


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    path = tmp_path / "plan.json"
    Plan.uniform(MODEL, Rule(guaranteed=3)).save(path)
    return path


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    found = capsys.readouterr()
    return int(end.value.code or 0), found.out, found.err


def pretend(monkeypatch: pytest.MonkeyPatch, found: tuple[str, str] | None) -> None:
    install = None if found is None else VllmInstall(*found)
    monkeypatch.setattr(installed_vllm, "find_vllm", lambda: install)
    monkeypatch.setattr("leanmoe.cli.serve.find_vllm", lambda: install)


def test_the_command_is_checked_and_shown(
    plan: Path, port: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend(monkeypatch, ("vllm", "0.24.0"))
    code, out, _ = run(
        capsys, "serve", "reference", "--plan", plan, "--port", port, "--dry-run", "--json",
        "--", "--max-model-len", "512",
    )  # fmt: skip
    found: dict[str, Any] = json.loads(out)
    assert code == 0
    assert found["environment"]["LEANMOE_PLAN"] == str(plan)
    assert found["command"][-2:] == ["--max-model-len", "512"]
    assert "leanmoe.serve.vllm.plan_metrics.PlanWorker" in found["command"]


def test_auto_takes_transformers_where_there_is_no_vllm(
    plan: Path, port: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend(monkeypatch, None)
    words = ("serve", "reference", "--plan", plan, "--port", port, "--dry-run", "--json")
    assert json.loads(run(capsys, *words)[1])["engine"] == "transformers"
    assert "vllm is not installed" in run(capsys, *words, "--engine", "vllm")[2]
    assert "takes none" in run(capsys, *words, "--", "--max-model-len", "512")[2]


def test_sglang_is_started_with_the_plan_and_its_metrics(
    plan: Path, port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    words = ("serve", "reference", "--port", port, "--engine", "sglang", "--dry-run", "--json")
    monkeypatch.setattr(installed_sglang, "find_spec", lambda _: None)
    assert "sglang is not installed" in run(capsys, *words, "--plan", plan)[2]
    monkeypatch.setattr("leanmoe.cli.serve.require_sglang", lambda with_plans: str(with_plans))
    code, out, _ = run(capsys, *words, "--plan", plan, "--", "--tp-size", "2")
    found: dict[str, Any] = json.loads(out)
    assert code == 0
    assert found["environment"] == {"LEANMOE_PLAN": str(plan)}
    assert found["command"][-3:] == ["--enable-metrics", "--tp-size", "2"]
    assert json.loads(run(capsys, *words)[1])["environment"] == {}
    prompt = tmp_path / "prompt.json"
    Plan.banded(MODEL, prompt=(Rule(top_k=2),) * MODEL.moe_layers).save(prompt)
    assert "SGLang: rules for prompt tokens" in run(capsys, *words, "--plan", prompt)[2]


def test_what_cannot_run_is_one_line(
    plan: Path,
    port: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pretend(monkeypatch, ("vllm", "0.19.1"))
    words = ("serve", "reference", "--dry-run", "--port", port)
    assert "0.24 or newer" in run(capsys, *words, "--plan", plan)[2]
    pretend(monkeypatch, ("vllm", "0.24.0"))
    other, prompt = tmp_path / "other.json", tmp_path / "prompt.json"
    Plan(Fingerprint("Qwen3MoeForCausalLM", 48, 48, 128, 8)).save(other)
    Plan.banded(MODEL, prompt=(Rule(top_k=2),) * MODEL.moe_layers).save(prompt)
    for words_, message in (
        (("--plan", other), "made for another model"),
        (("--plan", plan, "--engine", "vlm"), "--engine is 'vlm'"),
        (("--plan", plan, "--port", 70000), "--port is 70000"),
    ):
        code, _, error = run(capsys, *words, *words_)
        assert code == 1
        assert message in error
        assert len(error.strip().splitlines()) == 1
    assert run(capsys, *words, "--plan", prompt, "--drop", "prompt")[0] == 0
    assert run(capsys, *words, "--plan", prompt)[0] == 0


def test_of_several_levels_one_is_chosen(
    port: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pretend(monkeypatch, ("vllm", "0.24.0"))
    bands = Plan.uniform(MODEL, Rule(top_k=4)).bands
    path = tmp_path / "two.json"
    Plan(MODEL, (Level("0.2%", bands), Level("1%", bands))).save(path)
    for words in (
        ("serve", "reference", "--plan", path, "--dry-run", "--port", port, "--json"),
        ("export", path, "--json"),
        ("predict", "reference", "--plan", path, "--concurrency", "8"),
        ("bench", "reference", "--plan", path, "-o", tmp_path / "bench"),
        ("eval", "reference", "--plan", path, "-o", tmp_path / "eval"),
    ):
        code, _, error = run(capsys, *words)
        assert code == 1
        assert "the plan has the levels 0.2%, 1%: choose one (--level" in error
        code, _, error = run(capsys, *words, "--level", "2%")
        assert code == 1
        assert "level '2%' is not known" in error
        if words[0] in ("serve", "export"):
            chosen = json.loads(run(capsys, *words, "--level", "1%")[1])
            assert chosen["environment"]["LEANMOE_LEVEL"] == "1%"
    assert run(capsys, "predict", "reference", "--plan", path, "--level", "1%")[0] == 0
    none = ("--level", "1%")
    assert "--level 1% is one of a plan's" in run(capsys, "predict", "reference", *none)[2]
    assert "--level 1% is one of a plan's" in run(capsys, "serve", "reference", *none)[2]


def test_a_port_that_is_taken_is_said_so(
    plan: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, ("vllm", "0.24.0"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        words = ("serve", "reference", "--plan", plan, "--port", port, "--dry-run")
        assert f"cannot listen at 127.0.0.1:{port}" in run(capsys, *words)[2]


def test_export_prints_or_writes(
    plan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(capsys, "export", plan, "--engine", "vllm", "--model", "m")
    assert code == 0
    assert f"LEANMOE_PLAN={plan} vllm serve m" in out
    target = tmp_path / "run.sh"
    run(capsys, "export", plan, "--engine", "sglang", "-o", target)
    assert "sglang.launch_server" in target.read_text()
    assert json.loads(run(capsys, "export", plan, "--json")[1])["engine"] == "vllm"
    assert "guaranteed" in run(capsys, "export", plan, "--engine", "llama.cpp")[2]


def test_without_a_plan_the_full_model_is_served(
    port: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("serve", "reference", "--port", port, "--dry-run", "--json")
    pretend(monkeypatch, ("vllm", "0.24.0"))
    found = json.loads(run(capsys, *words)[1])
    assert not any(name.startswith("LEANMOE") for name in found["environment"])
    assert not any("leanmoe.serve" in word for word in found["command"])
    pretend(monkeypatch, None)
    assert json.loads(run(capsys, *words)[1])["plan"] == "none"
    assert "give one with --plan" in run(capsys, *words, "--drop", "prompt")[2]


def test_an_installation_is_checked_without_a_model(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    install = VllmInstall("vllm", "0.32.0")
    monkeypatch.setattr("leanmoe.cli.serve.require_vllm", lambda **_: install)
    monkeypatch.setattr("leanmoe.serve.vllm.survey.check_plugin", lambda: None)
    code, out, _ = run(capsys, "serve", "--check", "--json")
    found = json.loads(out)
    assert (code, found["version"], found["can_run_plans"]) == (0, "0.32.0", True)
    assert {"version", "plugin", "padding, V2 runner"} <= {f["name"] for f in found["findings"]}
    code, out, _ = run(capsys, "serve", "--check")
    assert code == 0
    assert "version: fits: vLLM 0.32.0 is one that leanmoe ran with" in out
    monkeypatch.setattr("leanmoe.cli.serve.require_vllm", lambda **_: VllmInstall("vllm", "0.20.0"))
    code, out, error = run(capsys, "serve", "--check")
    assert code == 1
    assert "version: does not fit" in out
    assert "a plan needs 0.24 or newer" in error


def test_a_model_must_be_named_to_be_served(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, error = run(capsys, "serve")
    assert code == 1
    assert "MODEL is missing" in error


def test_tiers_and_limits_reach_vllm_and_no_other_server(
    port: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pretend(monkeypatch, ("vllm", "0.32.0"))
    path, bands = tmp_path / "two.json", Plan.uniform(MODEL, Rule(top_k=4)).bands
    Plan(MODEL, (Level("careful", bands), Level("fast", bands))).save(path)
    words = ("serve", "reference", "--plan", path, "--dry-run", "--port", port, "--json")
    found = json.loads(run(capsys, *words, "--slo", "tpot=30ms", "--level", "full")[1])
    variables = {name: found["environment"][f"LEANMOE_{name}"] for name in ("SLO", "LEVEL")}
    assert variables == {"SLO": "tpot=30ms", "LEVEL": "full"}
    assert json.loads(run(capsys, *words, "--tiers")[1])["environment"]["LEANMOE_TIERS"] == "1"
    fastest = run(capsys, *words, "--slo", "tpot=30ms", "--level", "fast")[2]
    assert "--slo needs a faster level" in fastest
    assert "--level is 'quick'" in run(capsys, *words, "--tiers", "--level", "quick")[2]
    other = run(capsys, *words, "--engine", "transformers", "--tiers")[2]
    assert "serves one level of one plan" in other
