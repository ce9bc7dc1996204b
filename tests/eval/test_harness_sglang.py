"""lm-evaluation-harness's tasks through an OpenAI server, with a stand-in of SGLang's."""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path

import pytest

from leanmoe.core import installed_sglang
from leanmoe.eval import harness_sglang
from tests.eval.test_harness import WHY
from tests.eval.test_run import leanmoe, write_tasks

pytest.importorskip("lm_eval", reason=WHY)
pytest.importorskip("tenacity", reason="the harness's API needs it: pip install 'leanmoe[eval]'")


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands in for `leanmoe serve`: echoes prompts with log-probabilities that a plan changes."""
    script = tmp_path / "serve.py"
    script.write_text(
        textwrap.dedent("""
        import json, os, sys
        from http.server import BaseHTTPRequestHandler, HTTPServer
        words = sys.argv[1:]
        with open(os.environ["SEEN"], "a") as seen:
            print(json.dumps(words), file=seen)
        if "DIES" in os.environ:
            raise RuntimeError("out of memory")
        factor = 7 if "--plan" in words else 1
        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass
            def answer(self, value):
                body = json.dumps(value).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)
            def do_GET(self):
                card = {"id": words[0], "root": words[0], "max_model_len": 512}
                self.answer({"data": [{"object": "model", "owned_by": "sglang", **card}]})
            def do_POST(self):
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                choices = []
                for index, ids in enumerate(asked["prompt"]):
                    said = [None] + [-0.1 * (1 + n * factor % 11) for n in ids[1:]] + [-1.0]
                    tops = [None] + [{"a": value} for value in said[1:]]
                    logprobs = {"token_logprobs": said, "top_logprobs": tops}
                    choices.append({"index": index, "text": " 7", "logprobs": logprobs})
                self.answer({"choices": choices})
        port = int(words[words.index("--port") + 1])
        HTTPServer(("127.0.0.1", port), Handler).serve_forever()
        """)
    )
    monkeypatch.setenv("SEEN", str(tmp_path / "seen"))
    monkeypatch.setattr(harness_sglang, "SERVE", [sys.executable, str(script)])
    for module in (installed_sglang, harness_sglang):
        monkeypatch.setattr(module, "require_sglang", lambda **_: "0.5.23")
    return tmp_path


def evaluate(folder: Path) -> int:
    tasks = folder / "tasks"
    if not tasks.exists():
        tasks.mkdir()
        write_tasks(tasks)
    words = ["eval", "reference", "--tasks", "things", "--include-path", str(tasks)]
    words += ["--rule", "top_k=2", "--engine", "sglang", "--concurrency", "2", "--overwrite"]
    return leanmoe(*words, "-o", str(folder / "run"))


def test_each_plan_is_asked_in_a_server_of_its_own(served: Path) -> None:
    assert evaluate(served) == 0
    found = json.loads((served / "run" / "results.json").read_text())
    row = next(row for row in found["tasks"] if row["task"] == "things")
    assert row["items"] == 12
    assert row["lost"] + row["gained"] > 0, "the plan's server prefers other answers"
    assert "sglang 0.5.23" in json.dumps(found)
    seen = [json.loads(line) for line in (served / "seen").read_text().splitlines()]
    assert ["--plan" in words for words in seen] == [False, True]
    for words in seen:
        assert words[:3] == ["reference", "--engine", "sglang"]
        assert words[words.index("--max-running-requests") + 1] == "2"


def test_a_server_that_ends_is_said_in_one_line(
    served: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DIES", "1")
    assert evaluate(served) == 1
    assert "the SGLang server of full model ended with exit code 1: " in capsys.readouterr().err
