"""vLLM's server as bench starts it: a server for each variant, with its plan, and its end."""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from leanmoe.bench import vllm_server
from leanmoe.bench.over_http import OverHTTP
from leanmoe.bench.prompts import Supply
from leanmoe.bench.servers import ask
from leanmoe.bench.settings import BenchSettings, Lengths
from leanmoe.bench.sweep import Outcome
from leanmoe.bench.vllm_server import VLLMServer
from leanmoe.core.errors import LeanMoeError
from leanmoe.core.installed_vllm import VllmInstall
from leanmoe.plan import Plan, Rule
from leanmoe.plan.named_plans import Named

pytest.importorskip("guidellm", reason="the extra leanmoe[bench] is not installed")

SETTINGS = BenchSettings(
    ("reference",),
    concurrency=(2,),
    input_len=Lengths(4, 6),
    output_len=Lengths(3, 5),
    repeats=2,
    num_prompts=4,
    engine="vllm",
    engine_args=("--load-format", "dummy"),
)
SUPPLY = Supply(range(100), SETTINGS.input_len, SETTINGS.output_len)


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands in for `leanmoe serve`: lists a model, and writes down how it was started."""
    script = tmp_path / "serve.py"
    script.write_text(
        textwrap.dedent("""
        import os, sys
        from http.server import BaseHTTPRequestHandler, HTTPServer
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(200)
                self.end_headers()
                self.wfile.write(b'{"data": [{"id": "reference"}]}')
        with open(os.environ["SEEN"], "a") as seen:
            print(os.environ.get("LEANMOE_PLAN"), *sys.argv[1:], file=seen)
        print("vLLM's own words")
        if "DIES" in os.environ:
            raise RuntimeError("out of memory")
        port = int(sys.argv[sys.argv.index("--port") + 1])
        HTTPServer(("127.0.0.1", port), Handler).serve_forever()
        """)
    )
    monkeypatch.setenv("SEEN", str(tmp_path / "seen"))
    monkeypatch.setenv("LEANMOE_PLAN", "/left/over/from/the/shell.json")
    monkeypatch.setattr(
        vllm_server, "require_vllm", lambda _with_plans: VllmInstall("vllm", "0.24.0")
    )
    monkeypatch.setattr(vllm_server, "SERVE", [sys.executable, str(script)])
    return tmp_path


def test_each_variant_has_a_server_of_its_own_with_its_plan(
    started: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    plan = Plan.uniform("reference", Rule(top_k=2))
    mine = Named("mine", plan, started / "mine.json")
    runner = VLLMServer("reference", {"mine": mine}, None, SETTINGS, SUPPLY)

    def run_one(self: OverHTTP, name: str, *_: Any) -> Outcome:
        assert ask(self._servers[name]).model == "reference"
        return Outcome([])

    monkeypatch.setattr(OverHTTP, "_run_one", run_one)
    (load,) = SETTINGS.loads()
    with runner.at(load) as run:
        for name in ("full", "full", "mine", "full"):
            run(name, load, SUPPLY.draw(load, 0), "seed")
    runner.close()
    seen = [line.split() for line in (started / "seen").read_text().splitlines()]
    assert [line[0] for line in seen] == ["None"] * 3, "the shell's plan is nobody's"
    plans = [line[line.index("--plan") + 1] if "--plan" in line else None for line in seen]
    assert plans == [None, str(started / "mine.json"), None]
    assert ["--level" in line for line in seen] == [False, True, False], "the file may hold more"
    for line in seen:
        assert line[1:4] == ["reference", "--engine", "vllm"]
        assert "--max-model-len 11 --max-num-seqs 2" in " ".join(line)
        assert line[-2:] == ["--load-format", "dummy"], "the user's prevail"
    assert "vLLM's own words" not in capfd.readouterr().out, "--json stands alone"
    assert json.dumps(runner.describe())


@pytest.mark.usefixtures("started")
def test_a_server_that_ends_says_its_last_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIES", "1")
    runner = VLLMServer("reference", {}, None, SETTINGS, SUPPLY)
    (load,) = SETTINGS.loads()
    with (
        runner.at(load) as run,
        pytest.raises(LeanMoeError, match=r"of full ended with exit code 1: .*out of memory"),
    ):
        run("full", load, SUPPLY.draw(load, 0), "seed")
    runner.close()
