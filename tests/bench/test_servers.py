"""Addresses and what stands behind them: refused before any load is sent."""

from __future__ import annotations

import socket
import threading

import httpx
import pytest

from leanmoe.bench.servers import Server, answers, ask, is_server, read_address
from leanmoe.core.errors import LeanMoeError
from tests.bench.mock_server import serving


@pytest.mark.parametrize(
    ("target", "name", "url"),
    [
        ("http://127.0.0.1:8000", "127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("http://localhost:8000/v1/", "localhost:8000", "http://localhost:8000"),
        ("plan=http://[::1]:9000", "plan", "http://[::1]:9000"),
        ("http://127.0.0.1", "127.0.0.1:80", "http://127.0.0.1:80"),
    ],
)
def test_addresses(target: str, name: str, url: str) -> None:
    assert is_server(target)
    assert read_address(target) == Server(name, url)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("http://example.org", "not this machine.*--allow-remote"),
        ("http://10.0.0.3:8000", "not this machine"),
        ("http://127.0.0.1.example.org", "not this machine"),
        ("http://localhost.example.org", "not this machine"),
        ("http://", "no address"),
        ("http://127.0.0.1:99999", "no address"),
        ("http://127.0.0.1:8000/generate", "has a path"),
        ("http://me:secret@127.0.0.1:8000", "password"),
    ],
)
def test_other_addresses_are_refused(target: str, message: str) -> None:
    with pytest.raises(LeanMoeError, match=message) as caught:
        read_address(target)
    assert "secret" not in str(caught.value)


def test_another_machine_must_be_meant() -> None:
    assert read_address("http://10.0.0.3:8000", allow_remote=True).url == "http://10.0.0.3:8000"
    assert not is_server("reference")
    assert not is_server("org/model=name")


def test_what_a_server_serves() -> None:
    with serving() as mock:
        found = ask(read_address(mock.url))
        assert (found.model, found.max_tokens) == ("mock", 4096)
        with pytest.raises(LeanMoeError, match="does not serve other: it serves mock"):
            ask(read_address(mock.url), "other")
        assert answers(found)
    assert not answers(found)


@pytest.mark.parametrize(("said", "kept"), [(16, 16), (-1, None), (True, None), ("16", None)])
def test_a_length_that_is_none_is_not_kept(
    monkeypatch: pytest.MonkeyPatch, said: object, kept: int | None
) -> None:
    listed = {"data": [{"id": "a", "max_model_len": said}]}
    request = httpx.Request("GET", "http://127.0.0.1")
    monkeypatch.setattr(
        httpx, "get", lambda *_, **__: httpx.Response(200, json=listed, request=request)
    )
    assert ask(read_address("http://127.0.0.1")).max_tokens == kept


def test_a_server_that_is_down_is_one_line() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(LeanMoeError, match=r"does not answer.*start the server first"):
        ask(read_address(f"http://127.0.0.1:{port}"))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", "gives HTTP 404"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", "is not JSON"),
        (b'HTTP/1.1 200 OK\r\nContent-Length: 11\r\n\r\n{"data":[]}', "lists no model"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n" + b"[" * 5000, "is not JSON"),
        (b'HTTP/1.1 200 OK\r\nContent-Length: 12\r\n\r\n{"data": 64}', "lists no model"),
        (
            b'HTTP/1.1 200 OK\r\nContent-Length: 30\r\n\r\n{"data":[{"id": "\\ud800odd"}]}',
            r"lists a model '.ud800odd': no name has such characters",
        ),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "does not speak HTTP"),
    ],
)
def test_a_port_taken_by_something_else(answer: bytes, message: str) -> None:
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        client, _ = listener.accept()
        client.recv(4096)
        client.sendall(answer)
        client.close()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    with pytest.raises(LeanMoeError, match=message):
        ask(read_address(f"http://127.0.0.1:{listener.getsockname()[1]}"))
    thread.join(5)
    listener.close()
