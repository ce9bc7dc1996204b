"""Every verb's options come from its settings class, and from a file with --config."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from leanmoe.cli import VERBS
from leanmoe.core.options import make_settings
from leanmoe.eval.settings import EvalSettings
from leanmoe.prune.settings import PruneSettings
from tests.cli.test_main import run


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_every_verb_takes_a_config(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "run.toml"
    config.write_text("no-such-option = 1")
    code, out, err = run(capsys, verb, "--config", str(config))
    assert (code, out) == (1, "")
    assert "config" in err
    assert "the option 'no-such-option' is not known" in err


def test_the_command_line_goes_before_the_config(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "run.toml"
    config.write_text('model = "reference"\ntop-k = 4\nconcurrency = [1, 8]\njson = true')
    code, out, _ = run(capsys, "predict", "--config", str(config), "--concurrency", "2")
    assert code == 0
    (prediction,) = json.loads(out)
    assert prediction["load"].startswith("concurrency 2,")


def test_words_and_values_make_the_same_settings() -> None:
    words = {"model": "m", "tasks": "boolq,piqa", "margin": "1%", "domain": ["a=b"]}
    values = {"model": "m", "tasks": ("boolq", "piqa"), "margin": 0.01, "domain": [("a", "b")]}
    assert make_settings(EvalSettings, words) == make_settings(EvalSettings, values)
    assert make_settings(PruneSettings, {"model": "m", "keep": 48}).keep == "48"
