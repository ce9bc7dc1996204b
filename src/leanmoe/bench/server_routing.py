"""What a server's router does under load, read from its /metrics while requests are under way.

`leanmoe serve` shows its last step there in Prometheus' text format.
"""

from __future__ import annotations

import math
import re
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from leanmoe.bench.servers import ANSWER_SECONDS, Server, key_header
from leanmoe.bench.sweep import Outcome
from leanmoe.core.errors import LeanMoeError

PATH = "/metrics"
_LINE = re.compile(r"^(leanmoe_\w+)(?:\{(.*)\})? (\S+)$", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
_DISTINCT, _ACTIVATED = "leanmoe_distinct_experts", "leanmoe_activated_experts"
_ROWS, _BAND, _PLAN = "leanmoe_step_rows", "leanmoe_band", "leanmoe_plan"
INTERVAL = 0.05
"""Seconds between one sample and the next."""


def watch(server: Server, run: Callable[[], Outcome], most_rows: int) -> dict[str, Any]:
    """Experts a token used and distinct experts of a step, means over layers and samples.

    Steps are sampled while `run` sends its requests, of which none is timed. Those with more than
    `most_rows` rows are left out: they hold a prompt. Where no step can be seen there is "missing"
    instead, and why: no reason to end a bench. A server without leanmoe's metrics gets no request.
    """
    try:
        with httpx.Client(
            base_url=server.url, headers=key_header(), timeout=ANSWER_SECONDS, trust_env=False
        ) as client:
            _scrape(client)
            seen = [step for step in _sampled(client, run) if step and 1 <= step.rows <= most_rows]
    except LeanMoeError as error:
        return {"missing": str(error)}
    except httpx.HTTPError as error:
        return {"missing": f"it does not answer at {PATH}: {error or type(error).__name__}"}
    if not seen:
        return {"missing": f"no step of at most {most_rows} rows was seen at {PATH}"}
    bands = Counter((step.band, step.up_to) for step in seen)
    return {
        "experts_a_token": statistics.fmean(step.activated for step in seen),
        "distinct_experts_a_step": statistics.fmean(step.distinct for step in seen),
        "rows_a_step": statistics.fmean(step.rows for step in seen),
        "samples": len(seen),
        "bands": [
            {"band": band, "up_to": up_to, "samples": count}
            for (band, up_to), count in sorted(bands.items())
        ],
        "label": "measured",
    }


def _sampled(client: httpx.Client, run: Callable[[], Outcome]) -> list[ScrapedStep | None]:
    """What the server shows from the run's first token to its last; else it is an earlier run's."""
    samples: list[tuple[float, ScrapedStep | None]] = []
    errors: list[Exception] = []
    is_over = threading.Event()

    def sample() -> None:
        try:
            while not is_over.wait(INTERVAL):
                samples.append((time.time(), _scrape(client)))
        except (LeanMoeError, httpx.HTTPError) as error:
            errors.append(error)

    sampling = threading.Thread(target=sample)
    sampling.start()
    try:
        timelines = run().timelines
    finally:
        is_over.set()
        sampling.join()
    if errors:
        raise errors[0]
    first = min(timeline.tokens[0] for timeline in timelines)
    last = max(timeline.tokens[-1] for timeline in timelines)
    return [step for moment, step in samples if first < moment < last]


def _scrape(client: httpx.Client) -> ScrapedStep | None:
    answer = client.get(PATH)
    if answer.is_error:
        raise LeanMoeError(f"its {PATH} gives HTTP {answer.status_code}")
    return read_step(answer.text)


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
