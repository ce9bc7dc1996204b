"""The whole job on the reference model, very small: what it leaves, and what stops it."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from leanmoe import Plan
from leanmoe.cli import main
from leanmoe.core.provenance import weights_digest
from leanmoe.core.run_folder import RunFolder
from leanmoe.results.tune import TuneResults
from leanmoe.runtime import load_model, shape_of

SMALL = [
    *("--concurrency", "1,2", "--margins", "5%,20%", "--input-len", "32", "--output-len", "4"),
    *("--repeats", "3", "--profile-tokens", "2000", "--sensitivity-tokens", "400"),
    *("--heldout-tokens", "2500", "--text", "topics", "--text", "readmes"),
]


def leanmoe(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    return int(stopped.value.code or 0)


def tune(folder: Path, *more: str) -> int:
    return leanmoe("tune", "reference", "-o", str(folder), *SMALL, *more)


Step = Callable[[RunFolder, str, Callable[[], Any], bool], Any]


def watch_steps(patch: pytest.MonkeyPatch, stop_at: str = "") -> list[str]:
    """The names of the steps that are computed from now on; an interrupt at the first `stop_at`."""
    computed: list[str] = []
    step: Step = RunFolder.step

    def watched(
        folder: RunFolder, name: str, compute: Callable[[], Any], timed: bool = False
    ) -> Any:
        def noted() -> Any:
            if stop_at and name.startswith(stop_at):
                raise KeyboardInterrupt
            computed.append(name)
            return compute()

        return step(folder, name, noted, timed)

    patch.setattr(RunFolder, "step", watched)
    return computed


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that was interrupted on its way."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    with pytest.MonkeyPatch.context() as patch:
        before = watch_steps(patch, stop_at="strategy")
        assert tune(folder) == 130
    assert {"profiling", "full", "sensitivity-prompt-1", "layer-times-decode-2"} <= set(before)
    assert not (folder / "results.json").exists()
    with pytest.MonkeyPatch.context() as patch:
        after = watch_steps(patch)
        assert tune(folder, "--json") == 0
    assert not set(before) & set(after), "a step that is stored ran again"
    return folder


def test_an_interrupted_run_goes_on_to_its_end(run: Path) -> None:
    assert {f.name for f in run.glob("*")} >= {"plan.json", "results.json", "report.html"}
    assert not list(run.glob(".*")), "nothing half-written"


def test_results_say_how_everything_was_measured(run: Path) -> None:
    results = json.loads((run / "results.json").read_text())
    assert results["provenance"]["versions"]["torch"]
    assert results["peak_memory_bytes"] > 0
    (made,) = results["made_with"]
    assert made["weights"] == weights_digest("reference")
    assert set(made["steps"]) == set(results["seconds"])
    assert [(v["level"], v["concurrency"]) for v in results["verdicts"]] == [
        ("5%", 1),
        ("5%", 2),
        ("20%", 1),
        ("20%", 2),
    ]
    assert {s["phase"] for s in results["sensitivity"]["candidates"]} == {"prompt", "decode"}
    for entry in results["gain"]:
        names = list(entry["variants"])
        assert names[:2] == ["full", "plan"]
        assert names[2].startswith("transformers")
        assert all(len(v["runs"]) == 3 for v in entry["variants"].values())
    compared = {row["strategy"] for row in results["strategies"][-1]["rows"]}
    assert compared >= {"uniform", "bhep", "threshold", "top_p", "lexi", "guaranteed", "budget"}


def test_the_plan_is_one_for_this_model_and_claims_what_was_proven(run: Path) -> None:
    plan = Plan.load(run / "plan.json")
    model, _ = load_model("reference")
    plan.check(shape_of(model).fingerprint())
    results = TuneResults.load(run / "results.json")
    for name, margin in results.margins.items():
        own, level = results.of_level(name), {each.name: each for each in plan.levels}.get(name)
        accepted = [verdict for verdict in own.verdicts if verdict.accepted]
        assert (level is not None) == bool(accepted), "a level that claims nothing is absent"
        assert all(v.loss and v.loss.upper_bound <= margin.value for v in accepted)
        assert all(v.gain and v.gain.low > 1 for v in accepted)
        if level is not None:
            assert level.proof is not None
            assert level.proof.margin == margin
            assert [each.kind for each in level.proof.kinds] == ["topics", "readmes"]
            assert level.proof.bound >= max(v.loss.upper_bound for v in accepted if v.loss)
            for band, verdict in zip(level.bands, own.verdicts, strict=True):
                assert (band.up_to, not band.is_empty) == (verdict.up_to, verdict.accepted)
        for front in own.fronts:
            passed = [point.accepted for point in front.points]
            until = passed.index(False) + 1 if False in passed else len(passed)
            # Prompt rules that were accepted for all loads may stand behind what was tested here.
            assert passed[until:] in ([], [True]), "the first failure ends the sequence"


def test_a_memory_budget_restricts_every_rule(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    budget = ["--concurrency", "2", "--margins", "60%", "--keep", "50%"]
    budget += ["--criterion", "soft-count"]
    assert tune(tmp_path / "run", *budget) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    rows = results["total_or_activated"]
    assert [row["budget"] for row in rows] == ["50%"] * 3 + ["87.5%"] * 3 + ["75%"] * 3
    for pruned, skipped, both in zip(rows[::3], rows[1::3], rows[2::3], strict=True):
        assert pruned["way"] == "fewer in total"
        assert pruned["memory"] == both["memory"] < skipped["memory"] == 1
        assert skipped["against"]["verdict"]
    plan = Plan.load(tmp_path / "run" / "plan.json")
    rules = plan.level.rules
    assert plan.bands[-1].up_to is None
    assert {len(rule.experts or ()) for rule in rules} == {32}
    assert "Fewer experts in total" in (tmp_path / "run" / "report.html").read_text()
    shown = " ".join(capsys.readouterr().out.split())
    assert "Fewer experts in total" in shown
    assert "there is no such level" not in shown


def test_report_is_written_again_without_measuring(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    assert leanmoe("report", str(run), "--output", str(page)) == 0
    assert page.read_text() == (run / "report.html").read_text()
    assert "The page" in capsys.readouterr().out


def test_other_settings_do_not_mix_into_a_run(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tune(run, "--seed", "1") == 1
    assert "another seed" in capsys.readouterr().err


def _write(path: Path, documents: int, words: int) -> str:
    texts = [" ".join(f"{n}x{m} two three" for m in range(words)) for n in range(documents)]
    lines = [json.dumps({"text": text}) for text in texts]
    path.write_text("\n".join(lines))
    return str(path)


MISTAKES: dict[str, tuple[Callable[[Path], tuple[str, ...]], str]] = {
    "no such model": (lambda _: ("nowhere/at/all",), "nowhere"),
    "empty text": (
        lambda tmp: ("reference", "--text", _write(tmp / "empty.jsonl", 0, 0)),
        "holds no words",
    ),
    "too few documents": (
        lambda tmp: ("reference", "--text", _write(tmp / "few.jsonl", 12, 200)),
        "20 needed",
    ),
    "short documents": (
        lambda tmp: ("reference", "--text", _write(tmp / "short.jsonl", 100, 2)),
        "too short",
    ),
    "concurrency": (lambda _: ("reference", "--concurrency", "8,1"), "--concurrency is [8, 1]"),
    "margin": (lambda _: ("reference", "--margins", "lots"), "margins is 'lots'"),
    "margins that fall": (
        lambda _: ("reference", "--margins", "1%,0.5%"),
        "--margins is 1%,0.5%: it must be rising margins",
    ),
    "margins of two units": (
        lambda _: ("reference", "--margins", "1%,0.05 nats"),
        "all shares or all nats",
    ),
    "no repeats": (lambda _: ("reference", "--repeats", "1"), "repeats is 1"),
    "keep": (lambda _: ("reference", "--keep", "5%"), "keep"),
    "criterion": (lambda _: ("reference", "--keep", "75%", "--criterion", "reep"), "mean reap"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line_and_cost_nothing(
    mistake: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, message = MISTAKES[mistake]
    given = arguments(tmp_path)
    small = [] if any(a in given for a in ("--concurrency", "--margins", "--repeats")) else SMALL
    assert leanmoe("tune", *given, "-o", str(tmp_path / "run"), *small) == 1
    said = capsys.readouterr().err.strip()
    assert message in said
    assert "Traceback" not in said
    assert len(said.splitlines()) == 1


def test_a_dense_model_is_named_as_such(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    assert leanmoe("tune", str(tmp_path / "dense"), "-o", str(tmp_path / "run")) == 1
    assert "experts" in capsys.readouterr().err


def test_a_full_disk_is_said_and_leaves_nothing_half_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.write_text

    def full(path: Path, text: str, **settings: Any) -> int:
        if "profiling.json" in path.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, text, **settings)

    monkeypatch.setattr(Path, "write_text", full)
    assert tune(tmp_path / "run") == 1
    said = capsys.readouterr().err
    assert "No space left on device" in said
    assert "Traceback" not in said
    left = sorted(file.name for file in (tmp_path / "run").iterdir())
    assert left == ["profile.json", "profile.safetensors", "settings.json"]
