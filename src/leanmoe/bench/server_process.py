"""A server that this process starts and ends: waits for its answers, hears its last words."""

from __future__ import annotations

import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence

from leanmoe.bench.servers import Server, answers
from leanmoe.core.environment import LEVEL, PLAN
from leanmoe.core.errors import LeanMoeError

SECONDS_BETWEEN_LOOKS = 0.5
SECONDS_TO_LEAVE = 60.0


class ServerProcess:
    """A server's process, and what it printed."""

    def __init__(self, name: str, command: Sequence[str]) -> None:
        """`name` is what errors call it; `command` starts it, without any plan of this process."""
        self.name = name
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        environment = {key: value for key, value in os.environ.items() if key not in (PLAN, LEVEL)}
        self._process = subprocess.Popen(
            command, stdout=self._log, stderr=subprocess.STDOUT, env=environment
        )

    def wait_for(self, server: Server) -> None:
        """Waits until the server answers. Raises LeanMoeError where it ends before."""
        while not answers(server):
            self.check()
            time.sleep(SECONDS_BETWEEN_LOOKS)

    def check(self) -> None:
        """Raises LeanMoeError with the server's last words where it has ended."""
        code = self._process.poll()
        if code is not None:
            raise LeanMoeError(f"{self.name} ended with exit code {code}: {self._last_words()}")

    def close(self) -> None:
        """Ends the process and waits until its memory is free."""
        self._process.terminate()
        try:
            self._process.wait(SECONDS_TO_LEAVE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = [line.strip() for line in self._log if line.strip()]
        errors = [line for line in lines if "rror" in line]
        return (errors or lines or ["it said nothing"])[-1][-300:]


def free_port() -> int:
    """A port of this machine's loopback that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
