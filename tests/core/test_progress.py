"""Progress outside of a terminal: a line now and then, and one at the end."""

from __future__ import annotations

import pytest

from leanmoe.core import progress


def test_a_log_gets_the_last_line_at_once_and_others_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    with progress.bar("Profile", 4, "tokens") as advance:
        advance(1)
        assert capsys.readouterr().err == ""
        now = 20.0
        advance(1)
        assert capsys.readouterr().err == "Profile: 2/4 tokens, 20 s left\n"
        advance(2)
    assert capsys.readouterr().err == "Profile: 4/4 tokens, done in 20 s\n"


def test_nothing_to_do_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.bar("Profile", 0) as advance:
        advance(1)
    assert capsys.readouterr().err == ""
