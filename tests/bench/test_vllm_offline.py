"""vLLM's offline engine: the loop against an engine of the same form, and what is refused."""

from __future__ import annotations

import json
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from leanmoe.bench import vllm_offline
from leanmoe.bench.prompts import Supply
from leanmoe.bench.settings import BenchSettings, Lengths
from leanmoe.bench.vllm_offline import VLLMOffline
from leanmoe.core.errors import LeanMoeError
from leanmoe.core.installed_vllm import VllmInstall

SETTINGS = BenchSettings(
    concurrency=(2,), input_len=Lengths(4, 6), output_len=Lengths(3, 5), repeats=2, num_prompts=4
)


@dataclass
class Engine:
    """Gives every request one token a step, as vLLM's engine hands over deltas."""

    def __post_init__(self) -> None:
        self.left: dict[str, int] = {}
        self.most = 0

    def add_request(self, name: str, prompt: dict[str, Any], wanted: int) -> None:
        assert prompt["prompt_token_ids"]
        self.left[name] = wanted
        self.most = max(self.most, len(self.left))

    def step(self) -> list[Any]:
        outputs = []
        for name in list(self.left):
            self.left[name] -= 1
            done = self.left[name] == 0
            piece = SimpleNamespace(token_ids=[7])
            outputs.append(SimpleNamespace(request_id=name, outputs=[piece], finished=done))
            if done:
                del self.left[name]
        return outputs


def test_the_loop_keeps_as_many_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_offline, "sampling", lambda tokens: tokens)
    engine = Engine()
    requests: list[dict[str, Any]] = [
        {"prompt": [1] * (3 + n), "output": 2 + n % 3} for n in range(10)
    ]
    found = vllm_offline.closed_loop(engine, requests, 4, 60.0)
    assert engine.most == 4
    assert sorted(a["output"] for a in found) == sorted(r["output"] for r in requests)
    assert sorted(a["input"] for a in found) == [3 + n for n in range(10)]
    assert all(a["sent"] <= a["tokens"][0] <= a["tokens"][-1] for a in found)
    few = vllm_offline.closed_loop(Engine(), requests, 4, -1.0)
    assert len(few) == 1, "after the first, nothing is sent when the time is up"


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for the worker: answers as it does, and writes down LEANMOE_PLAN."""
    script = tmp_path / "worker.py"
    script.write_text(
        textwrap.dedent("""
        import json, os, sys
        with open(os.environ["SEEN"], "a") as seen:
            seen.write(str(os.environ.get("LEANMOE_PLAN")) + "\\n")
        for number, line in enumerate(sys.stdin):
            job = json.loads(line)
            if number == int(os.environ.get("DIES_AT", -1)):
                print("RuntimeError: out of memory", file=sys.stderr)
                sys.exit(3)
            print(json.dumps({} if number == 0 else [
                {"sent": 0.0, "tokens": [1.0, 2.0], "input": len(r["prompt"]),
                 "output": r["output"]} for r in job["requests"]
            ]), flush=True)
        """)
    )
    monkeypatch.setenv("SEEN", str(tmp_path / "seen"))
    monkeypatch.setenv("LEANMOE_PLAN", "/left/over/from/the/shell.json")
    monkeypatch.setattr(
        vllm_offline, "require_vllm", lambda _with_plans: VllmInstall("vllm", "0.24.0")
    )
    monkeypatch.setattr(vllm_offline, "WORKER", [sys.executable, str(script)])
    return tmp_path


def test_each_variant_has_an_engine_of_its_own_with_its_plan(worker: Path) -> None:
    supply = Supply(range(100), SETTINGS.input_len, SETTINGS.output_len)
    runner = VLLMOffline("reference", {"mine": worker / "mine.json"}, SETTINGS, supply)
    (load,) = SETTINGS.loads()
    requests = supply.draw(load, 0)
    with runner.at(load) as run_one:
        for name in ("full", "full", "mine", "full"):
            outcome = run_one(name, load, requests, "seed")
            assert [t.output_tokens for t in outcome.timelines] == [
                r.output_tokens for r in requests
            ]
    runner.close()
    seen = (worker / "seen").read_text().split()
    assert seen == ["None", str(worker / "mine.json"), "None"]


@pytest.mark.usefixtures("worker")
def test_an_engine_that_ends_says_its_last_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIES_AT", "1")
    supply = Supply(range(100), SETTINGS.input_len, SETTINGS.output_len)
    runner = VLLMOffline("reference", {}, SETTINGS, supply)
    (load,) = SETTINGS.loads()
    with (
        runner.at(load) as run_one,
        pytest.raises(LeanMoeError, match=r"of full ended with exit code 3: .*out of memory"),
    ):
        run_one("full", load, supply.draw(load, 0), "seed")
    runner.close()
    assert json.dumps(runner.describe()["model"]["settings"])
