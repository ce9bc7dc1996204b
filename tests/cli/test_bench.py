"""`leanmoe bench` from the command line."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

import pytest

from leanmoe.models.shape import read_shape
from leanmoe.plan import Plan, Rule
from tests.cli.test_main import run

TEXT = Path(__file__).parents[2] / "docs"
SMALL = [
    f"--text={TEXT}",
    "--concurrency=2",
    "--input-len=6:10",
    "--output-len=3",
    "--num-prompts=4",
    "--repeats=2",
]


def test_block_results_and_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = tmp_path / "three.json"
    Plan.uniform(read_shape("reference").fingerprint(), Rule(top_k=3)).save(plan)
    out_folder = tmp_path / "out"
    command = ["bench", "reference", "--plan", str(plan), *SMALL, "-o", str(out_folder)]
    code, out, _ = run(capsys, *command, "--goodput", "ttft:9000", "tpot:9000")
    assert code == 0
    assert "Serving Benchmark Result" in out
    assert "Request goodput (req/s):" in out
    assert "three over full: output tokens/s" in out
    results = json.loads((out_folder / "results.json").read_text())
    assert results["settings"]["goodput"] == {"ttft": 9000.0, "tpot": 9000.0}
    assert results["complete"]
    assert "<h2>Gain against load" in (out_folder / "report.html").read_text()
    page = (out_folder / "report.html").read_text()
    code, out, _ = run(capsys, "report", str(out_folder))
    assert (code, (out_folder / "report.html").read_text()) == (0, page)
    code, out, err = run(capsys, *command)
    assert (code, out) == (1, "")
    assert "add --overwrite" in err


def test_an_engine_that_is_not_there_is_said_before_text_is_read(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def absent(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    code, _, err = run(
        capsys, "bench", "reference", "--engine", "vllm", *SMALL, "-o", str(tmp_path / "out")
    )
    assert (code, err) == (
        1,
        "leanmoe: vllm is not installed: pip install 'leanmoe[vllm]', or choose another --engine\n",
    )


def test_json_alone_on_standard_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "bench", "reference", *SMALL, "--json", "-o", str(tmp_path))
    assert code == 0
    assert json.loads(out)["leanmoe_bench"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["reference", "--concurrency", "8,1"], "must be rising"),
        (["reference", "--input-len", "many"], "--input-len is 'many'"),
        (["reference", "--request-rate", "fast"], "--request-rate is 'fast'"),
        (["reference", "--goodput", "itl:5"], "--goodput has 'itl:5'"),
        (["reference", "other"], "2 models were given"),
        (["reference", "--dataset-path", "/no/such.jsonl"], "cannot read dataset"),
        (["reference", "--plan", "/no/such.json"], "cannot read plan"),
        (["http://127.0.0.1:9"], "does not answer"),
        (["http://example.org"], "--allow-remote"),
        (["no/such/folder"], "no/such/folder"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, out, err = run(capsys, "bench", *arguments, "-o", str(tmp_path / "out"))
    assert (code, out) == (1, "")
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()
