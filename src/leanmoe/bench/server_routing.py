"""What a server's router does under load, read from its /metrics while requests are under way.

`leanmoe serve` shows its last step there in Prometheus' text format. The load is short and not
timed.
"""

from __future__ import annotations

import asyncio
import math
import random
import re
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from leanmoe.bench.servers import ANSWER_SECONDS, Server
from leanmoe.bench.settings import ServiceLoad
from leanmoe.core.errors import LeanMoeError

PATH = "/metrics"
_LINE = re.compile(r"^(leanmoe_\w+)(?:\{(.*)\})? (\S+)$", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
_DISTINCT, _ACTIVATED = "leanmoe_distinct_experts", "leanmoe_activated_experts"
_ROWS, _BAND, _PLAN = "leanmoe_step_rows", "leanmoe_band", "leanmoe_plan"
SAMPLES = 12
INTERVAL = 0.05
"""Seconds between one sample and the next."""
SECONDS = 30.0
"""After so long no request is sent any more."""


def watch(
    server: Server,
    load: ServiceLoad,
    rows: Sequence[Mapping[str, Any]],
    decode_batch: int,
    most_rows: int,
    patience: float,
) -> dict[str, Any]:
    """Experts a token used and distinct experts of a step, means over layers and samples.

    Args:
        rows: requests, each with "prompt" and "output_tokens_count"; sent until there are SAMPLES
            samples. Those under way then end as they would.
        decode_batch: at most so many are under way at once.
        most_rows: steps with more rows are left out: they hold a prompt.
        patience: seconds that one request may take.

    Where that cannot be seen there is "missing" instead, and why: no reason to end a bench.
    """
    try:
        return asyncio.run(_watched(server, load, rows, decode_batch, most_rows, patience))
    except LeanMoeError as error:
        return {"missing": str(error)}
    except httpx.HTTPError as error:
        return {"missing": f"it does not answer at {PATH}: {error or type(error).__name__}"}


async def _watched(
    server: Server,
    load: ServiceLoad,
    rows: Sequence[Mapping[str, Any]],
    decode_batch: int,
    most_rows: int,
    patience: float,
) -> dict[str, Any]:
    everyone = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(
        base_url=server.url, timeout=patience, trust_env=False, limits=everyone
    ) as client:
        before = await _scrape(client)  # raises where there is nothing to see
        sender = _Sender(client, server.model, rows)
        sending = asyncio.create_task(sender.send(load, decode_batch))
        try:
            seen = await _sample(client, sender, sending, before, most_rows)
        finally:
            sender.is_stopped = True
            await sending
    if not seen:
        why = f", {sender.failed} requests failed" if sender.failed else ""
        raise LeanMoeError(f"no step of at most {most_rows} rows was seen at {PATH}{why}")
    return _summary(seen)


async def _sample(
    client: httpx.AsyncClient,
    sender: _Sender,
    sending: asyncio.Task[None],
    before: ScrapedStep | None,
    most_rows: int,
) -> list[ScrapedStep]:
    """The steps that are shown while requests are under way."""
    seen: list[ScrapedStep] = []
    is_ours = False
    end = time.monotonic() + SECONDS
    while len(seen) < SAMPLES and time.monotonic() < end and not sending.done():
        await asyncio.sleep(INTERVAL)
        if not sender.under_way:
            continue
        step = await _scrape(client)
        is_ours |= step != before or sender.ended > 0  # else it may be the last of an earlier run
        if is_ours and step is not None and 1 <= step.rows <= most_rows:
            seen.append(step)
    return seen


async def _scrape(client: httpx.AsyncClient) -> ScrapedStep | None:
    answer = await client.get(PATH, timeout=ANSWER_SECONDS)
    if answer.is_error:
        raise LeanMoeError(f"its {PATH} gives HTTP {answer.status_code}")
    return read_step(answer.text)


def _summary(seen: Sequence[ScrapedStep]) -> dict[str, Any]:
    bands = Counter((step.band, step.up_to) for step in seen)
    return {
        "experts_a_token": sum(step.activated for step in seen) / len(seen),
        "distinct_experts_a_step": sum(step.distinct for step in seen) / len(seen),
        "rows_a_step": sum(step.rows for step in seen) / len(seen),
        "samples": len(seen),
        "bands": [
            {"band": band, "up_to": up_to, "samples": count}
            for (band, up_to), count in sorted(bands.items())
        ],
        "label": "measured",
    }


class _Sender:
    """Keeps a load's requests under way until it is stopped or out of them."""

    def __init__(
        self, client: httpx.AsyncClient, model: str, rows: Sequence[Mapping[str, Any]]
    ) -> None:
        self._client, self._model, self._rows = client, model, rows
        self.under_way = self.ended = self.failed = 0
        self.is_stopped = False
        """Whether no further request is sent."""

    async def send(self, load: ServiceLoad, decode_batch: int) -> None:
        """A closed loop, or an open one at the load's rate, with so many at once at most."""
        rng = random.Random(load.name)
        gate = asyncio.Semaphore(decode_batch)
        async with asyncio.TaskGroup() as group:
            for row in self._rows:
                await gate.acquire()
                if self.is_stopped:
                    break
                group.create_task(self._one(row)).add_done_callback(lambda _: gate.release())
                if load.rate is not None:
                    await asyncio.sleep(rng.expovariate(load.rate))

    async def _one(self, row: Mapping[str, Any]) -> None:
        wanted = {
            "model": self._model,
            "prompt": row["prompt"],
            "max_tokens": row["output_tokens_count"],
            "temperature": 0.0,
            "ignore_eos": True,
        }
        self.under_way += 1
        try:
            answer = await self._client.post("/v1/completions", json=wanted)
            self.failed += answer.is_error
        except httpx.HTTPError:
            self.failed += 1
        self.under_way -= 1
        self.ended += 1


@dataclass(frozen=True)
class ScrapedStep:
    """The last step that a server ran; experts are means over its MoE layers."""

    rows: int
    band: str
    """The server's name for it: a number, or "full model"."""
    up_to: str
    distinct: float
    """Experts that the step activated."""
    activated: float
    """Experts a token used."""


def read_step(text: str) -> ScrapedStep | None:
    """The step in a server's answer; None where it ran none yet.

    Raises LeanMoeError where leanmoe's metrics are missing or incomplete.
    """
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for name, labels, value in _LINE.findall(text):
        found.setdefault(name, []).append((dict(_LABEL.findall(labels)), _number(name, value)))
    if _PLAN not in found:
        raise LeanMoeError(f"it does not show leanmoe's metrics at {PATH}")
    if _ROWS not in found:
        return None
    distinct, activated = _by_layer(found, _DISTINCT), _by_layer(found, _ACTIVATED)
    if set(distinct) != set(activated):
        raise LeanMoeError(f"its {_DISTINCT} and {_ACTIVATED} are of different layers")
    bands = found.get(_BAND, [])
    if len(found[_ROWS]) != 1 or len(bands) != 1 or not {"band", "up_to"} <= set(bands[0][0]):
        raise LeanMoeError(f"its {PATH} must have one {_ROWS} and one {_BAND}")
    band = bands[0][0]
    return ScrapedStep(
        int(found[_ROWS][0][1]),
        band["band"],
        band["up_to"],
        statistics.mean(distinct.values()),
        statistics.mean(activated.values()),
    )


def _number(name: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise LeanMoeError(f"its {name} is {value!r}: it must be a number, 0 or more")
    return number


def _by_layer(
    found: Mapping[str, list[tuple[dict[str, str], float]]], name: str
) -> dict[str, float]:
    gauges = found.get(name, [])
    values = {labels.get("layer", ""): value for labels, value in gauges}
    if not values or len(values) != len(gauges) or "" in values:
        raise LeanMoeError(f"its {name} must have one value for each of its layers")
    return values
