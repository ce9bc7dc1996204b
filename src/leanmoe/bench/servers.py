"""The servers a load is sent to: which they are, whether they answer, and what they serve."""

from __future__ import annotations

import ipaddress
import json
import os
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

from leanmoe.core.errors import LeanMoeError, shown

ANSWER_SECONDS = 10.0
KEY = "OPENAI_API_KEY"
"""The variable of the environment that holds a server's key, as for `vllm bench serve`."""
MOST_OF_A_REASON = 300
"""Characters of a server's own words in an error."""


@dataclass(frozen=True)
class Server:
    """One server under test."""

    name: str
    url: str
    """Without a path: requests go to its /v1/completions."""
    model: str = ""
    """Its name for what it serves."""
    root: str | None = None
    """Where the model came from, if the server says so."""
    max_tokens: int | None = None
    """Most tokens of prompt and reply, if the server says so."""


def is_server(target: str) -> bool:
    """Whether a target of `leanmoe bench` is an address, with or without NAME= before it."""
    return target.partition("=")[2].startswith(("http://", "https://")) or target.startswith(
        ("http://", "https://")
    )


def read_address(target: str, allow_remote: bool = False) -> Server:
    """Reads URL or NAME=URL. Raises LeanMoeError for what is no address, or not this machine's.

    A load test of someone else's machine is an attack on it, so one must say that it is meant.
    """
    name, mark, url = target.partition("=")
    if not mark or name.startswith("http"):
        name, url = "", target
    try:
        parts = urlsplit(url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError as error:
        raise LeanMoeError(f"{url} is no address: {error}") from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise LeanMoeError(f"{url} is no address: it must be like http://127.0.0.1:8000")
    if parts.username or parts.password:
        raise LeanMoeError(f"{parts.hostname} was given with a password in its address: leave it")
    if parts.path.rstrip("/") not in ("", "/v1") or parts.query:
        raise LeanMoeError(f"{url} has a path: give the server's address alone")
    if not (allow_remote or is_local(parts.hostname)):
        raise LeanMoeError(
            f"{parts.hostname} is not this machine: a load can take a server down, so add "
            "--allow-remote if it is yours to test"
        )
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return Server(name or f"{host}:{port}", f"{parts.scheme}://{host}:{port}")


def is_local(host: str) -> bool:
    """Whether a host is this machine's loopback."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def ask(server: Server, model: str | None = None) -> Server:
    """The server with what it serves. Raises LeanMoeError where none answers as OpenAI's do."""
    models = _models(server)
    known = {str(each["id"]): each for each in models}
    if model is not None and model not in known:
        raise LeanMoeError(f"{server.url} does not serve {model}: it serves {', '.join(known)}")
    chosen = known[model] if model is not None else next(iter(known.values()))
    root, most = chosen.get("root"), chosen.get("max_model_len")
    return replace(
        server,
        model=str(chosen["id"]),
        root=str(root) if root else None,
        max_tokens=most if type(most) is int and most > 0 else None,
    )


def answers(server: Server) -> bool:
    """Whether the server still lists its models."""
    try:
        _models(server)
    except LeanMoeError:
        return False
    return True


def api_key() -> str | None:
    """The key that servers are asked with, from the environment."""
    return os.environ.get(KEY) or None


def key_header() -> dict[str, str]:
    """The header that holds the key; none without one."""
    key = api_key()
    return {} if key is None else {"Authorization": f"Bearer {key}"}


def reason_in(body: str) -> str:
    """What a server says of an error: the message of its JSON, else the text itself, in one line.

    OpenAI's and vLLM's servers have it under "error", FastAPI's under "detail".
    """
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        value = body
    for name in ("error", "detail", "message"):
        if isinstance(value, dict) and value.get(name):
            value = value[name]
    words = " ".join((value if isinstance(value, str) else json.dumps(value)).split())
    return words[:MOST_OF_A_REASON]


def _models(server: Server) -> list[dict[str, Any]]:
    import httpx  # comes with GuideLLM and with Transformers, which --help does without

    none = f"{server.url} is no OpenAI-compatible server:"
    try:
        # A proxy of the environment is not asked: it would be measured with the server.
        answer = httpx.get(
            f"{server.url}/v1/models", headers=key_header(), timeout=ANSWER_SECONDS, trust_env=False
        )
        value = answer.raise_for_status().json()
    except httpx.HTTPStatusError as error:
        code = error.response.status_code
        reason = reason_in(error.response.text)
        hint = f"; set {KEY} to its key" if code in (401, 403) else ""
        said = f" ({reason})" if reason else ""
        raise LeanMoeError(f"{none} /v1/models gives HTTP {code}{said}{hint}") from error
    except httpx.ProtocolError as error:
        raise LeanMoeError(f"{none} it does not speak HTTP") from error
    except httpx.HTTPError as error:
        raise LeanMoeError(
            f"{server.url} does not answer: {error}; start the server first"
        ) from error
    except (ValueError, RecursionError) as error:
        raise LeanMoeError(f"{none} /v1/models is not JSON") from error
    models = value.get("data") if isinstance(value, dict) else None
    models = models if isinstance(models, list) else []
    if not models or not all(isinstance(each, dict) and each.get("id") for each in models):
        raise LeanMoeError(f"{server.url} lists no model at /v1/models: it has none to measure")
    if odd := next((each["id"] for each in models if not str(each["id"]).isprintable()), None):
        raise LeanMoeError(f"{server.url} lists a model {shown(odd)}: no name has such characters")
    return models
