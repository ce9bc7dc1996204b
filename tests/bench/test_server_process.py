"""A server that is started and ended, on small programs."""

from __future__ import annotations

import sys

import pytest

from leanmoe.bench.server_process import ServerProcess, free_port
from leanmoe.bench.servers import Server
from leanmoe.core.errors import LeanMoeError


def test_a_process_that_ends_before_it_answers_says_its_last_error() -> None:
    words = (
        "print('starting'); print('ValueError: no such model'); print('bye'); raise SystemExit(3)"
    )
    process = ServerProcess("the server of mine", [sys.executable, "-c", words])
    server = Server("mine", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(
        LeanMoeError, match="the server of mine ended with exit code 3: ValueError: no such model"
    ):
        process.wait_for(server)
    process.close()


def test_a_plan_of_the_shell_is_nobodys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEANMOE_PLAN", "plan.json")
    monkeypatch.setenv("LEANMOE_LEVEL", "1%")
    words = "import os; raise SystemExit(len([n for n in os.environ if n.startswith('LEANMOE_')]))"
    process = ServerProcess("it", [sys.executable, "-c", words])
    with pytest.raises(LeanMoeError, match="exit code 0: it said nothing"):
        process.wait_for(Server("it", f"http://127.0.0.1:{free_port()}"))
    process.close()
