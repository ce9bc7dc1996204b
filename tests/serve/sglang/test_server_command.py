"""The command that serves a model in SGLang, and what is set for it."""

from __future__ import annotations

from pathlib import Path

from leanmoe.models.reference import path as reference_path
from leanmoe.serve.sglang.server_command import command, environment


def test_variables_are_those_of_the_plan() -> None:
    path = Path("plan.json")
    assert environment(None, []) == {}
    assert environment(path, ["prompt"], "0.5%") == {
        "LEANMOE_PLAN": str(path.resolve()), "LEANMOE_LEVEL": "0.5%", "LEANMOE_DROP": "prompt",
    }  # fmt: skip


def test_what_the_user_adds_prevails() -> None:
    words = command("reference", "127.0.0.1", 8000, ["--port", "9"])
    assert words[1:3] == ["-m", "sglang.launch_server"]
    assert words[words.index("--model-path") + 1] == str(reference_path())
    assert words[words.index("--served-model-name") + 1] == "reference"
    assert "--enable-metrics" in words
    assert words[-2:] == ["--port", "9"]
