"""Which pieces of a server's stream are tokens."""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("guidellm", reason="the extra leanmoe[bench] is not installed")

from leanmoe.bench.guidellm_client import TimedCompletions
from leanmoe.bench.over_http import _reason


def piece(text: str | None, tokens: int | None = None) -> str:
    found: dict[str, Any] = {"choices": [] if text is None else [{"text": text, "index": 0}]}
    if tokens is not None:
        found["usage"] = {"prompt_tokens": 3, "completion_tokens": tokens}
    return f"data: {json.dumps(found)}"


def arrivals(*lines: str) -> int:
    client = TimedCompletions()
    for line in lines:
        client.add_streaming_line(line)
    return len(client._arrivals)


def test_usage_once_at_the_end_is_no_token() -> None:
    """As Transformers' server sends it."""
    assert arrivals(piece("a"), piece("b"), piece("", 2)) == 2


def test_a_token_without_text_counts_where_usage_comes_with_each() -> None:
    """As vLLM sends it: part of a character has no text yet."""
    assert arrivals(piece("a", 1), piece("", 2), piece("b", 3), piece(None, 3)) == 3


def test_a_token_that_only_the_last_usage_tells_of_came_with_it() -> None:
    assert arrivals(piece("a"), piece("", 2)) == 2


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ([piece("a"), 'error: {"code": 500, "message": "context is full"}'], "context is full"),
        ([piece("a"), "event: error", 'data: {"message": "engine died"}'], "engine died"),
        ([piece("a"), 'data: {"error": {"message": "out of memory"}}'], "out of memory"),
    ],
)
def test_a_servers_error_in_its_stream_is_raised(lines: list[str], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        arrivals(*lines)


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        (['{"error": {"message": "soft failure"}}'], "no token came, but soft failure"),
        (["<html>", "<h1>Sign in</h1>"], "no token came, but <html><h1>Sign in"),
        (['data: {"choices": [{"delta": {"content": "a"}}]}'], "no token came, but nothing that"),
    ],
)
def test_a_body_that_is_no_stream_of_tokens_is_shown(lines: list[str], reason: str) -> None:
    client = TimedCompletions()
    for line in lines:
        client.add_streaming_line(line)
    with pytest.raises(ValueError, match=reason):
        client.post_validation(None)


def test_events_and_comments_are_no_errors() -> None:
    assert arrivals(": ping", "event: message", "id: 3", piece("a"), "data: [DONE]") == 1


@pytest.mark.parametrize("tokens", [-5, 10**400, True])
def test_a_count_that_no_reply_has_is_none(tokens: int) -> None:
    client = TimedCompletions()
    client.add_streaming_line(piece("a", tokens))
    assert client._counted == 0


def test_a_reason_is_one_line() -> None:
    assert _reason(repr(ValueError("HTTP 400: no"))) == "HTTP 400: no"
    assert _reason(repr(ValueError(" "))) == "ValueError(' ')"
    assert _reason("two\nlines") == "two lines"
