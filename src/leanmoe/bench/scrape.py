"""What a server says of its routing at /metrics: the last step, in Prometheus' text format.

`leanmoe serve` shows it (`engines/metrics.py`). Another's text may be anything: it is checked.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from leanmoe.core.errors import LeanMoeError

PATH = "/metrics"
MOST_BYTES = 8 << 20
"""Of a server's answer; vLLM's has tens of thousands."""
MOST_LAYERS = 10_000
_LINE = re.compile(r"^(leanmoe_\w+)(?:\{(.*)\})? (\S+)$", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
_ABSENT = "it does not show leanmoe's metrics at /metrics"
_DISTINCT, _ACTIVATED = "leanmoe_distinct_experts", "leanmoe_activated_experts"
_ROWS, _BAND, _PLAN = "leanmoe_step_rows", "leanmoe_band", "leanmoe_plan"


@dataclass(frozen=True)
class ScrapedStep:
    """The last step that a server ran; experts are means over its MoE layers."""

    rows: int
    band: str
    """As the server names it: a number, or "full model"."""
    up_to: str
    distinct: float
    """Experts that the step activated."""
    activated: float
    """Experts a token used."""


def read_step(body: bytes) -> ScrapedStep | None:
    """The step in a server's answer; None where it ran none yet.

    Raises LeanMoeError where leanmoe's metrics are missing, or cannot be true.
    """
    if len(body) > MOST_BYTES:
        raise LeanMoeError(f"its /metrics has more than {MOST_BYTES:,} bytes")
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise LeanMoeError("its /metrics is no text in UTF-8") from error
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for name, labels, value in _LINE.findall(text):
        gauge = found.setdefault(name, [])
        gauge.append((dict(_LABEL.findall(labels)), _number(name, value)))
    if _PLAN not in found:
        raise LeanMoeError(_ABSENT)
    if _ROWS not in found:
        return None
    distinct, activated = _by_layer(found, _DISTINCT), _by_layer(found, _ACTIVATED)
    if set(distinct) != set(activated):
        raise LeanMoeError(f"its {_DISTINCT} and {_ACTIVATED} are of different layers")
    for layer, experts in activated.items():
        if experts > distinct[layer] + 1e-4 * experts:  # written with six digits
            raise LeanMoeError(
                f"its layer {layer} has {_ACTIVATED} {experts:g}, more than its {_DISTINCT}, "
                f"{distinct[layer]:g}"
            )
    bands = found.get(_BAND, [])
    if len(found[_ROWS]) != 1 or len(bands) != 1 or not {"band", "up_to"} <= set(bands[0][0]):
        raise LeanMoeError(f"its /metrics must have one {_ROWS} and one {_BAND}")
    band = bands[0][0]
    return ScrapedStep(
        int(found[_ROWS][0][1]), band["band"], band["up_to"], _mean(distinct), _mean(activated)
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
    values = {labels.get("layer", ""): value for labels, value in found.get(name, [])}
    if not 1 <= len(values) <= MOST_LAYERS or len(values) != len(found[name]) or "" in values:
        raise LeanMoeError(
            f"its {name} must have one value for each of 1 to {MOST_LAYERS:,} layers"
        )
    return values


def _mean(by_layer: Mapping[str, float]) -> float:
    return sum(by_layer.values()) / len(by_layer)
