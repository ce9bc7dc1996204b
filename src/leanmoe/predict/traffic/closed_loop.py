"""Throughput and latency of a closed loop, from the times of its steps, in one formula.

What `leanmoe predict --sweep` uses; `simulate` does the same event by event. n requests decode, and
in the O steps that each takes to give its output tokens, n prompts of I tokens come in, in parts
that fill a step beside what decodes. So a round lasts O plain steps and what the parts add.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from leanmoe.core.errors import LeanMoeError
from leanmoe.predict.experts.curves import Activation
from leanmoe.predict.step.step_time import Parts, StepBatch, StepTime
from leanmoe.predict.traffic.service_load import ServiceLoadModel


@dataclass(frozen=True)
class Served:
    """What a load gets. Seconds, and tokens a second."""

    output_throughput: float
    ttft: float
    tpot: float
    running: float
    """Requests that run in the engine; the others wait for room in the KV cache."""
    step: Parts
    """A step in which all decode."""


def closed_loop(
    step: StepTime, activation: Activation, load: ServiceLoadModel, experts: float | None = None
) -> Served:
    """Mean throughput, TTFT and TPOT at `load.concurrency`.

    Raises LeanMoeError where the weights or one single request do not fit.
    """
    if load.concurrency is None:
        raise LeanMoeError("the steady state is that of --concurrency; --request-rate is simulated")
    inputs, outputs = load.inputs.mean, load.outputs.mean
    context = inputs + load.outputs.remaining
    memory = step.deployment.memory(step.model, experts)
    room = memory.sequences(step.model, context, step.deployment)
    if room < 1:
        raise LeanMoeError(
            f"one request of {context:.0f} tokens does not fit the KV cache of {step.deployment}: "
            f"{memory.cache / 1e9:.1f} GB are left"
        )
    running = min(load.concurrency, room)
    plain = step.parts(StepBatch(running, context), activation)
    part = min(inputs, max(load.step_tokens - running, 16.0))
    parts_each = inputs / part
    before = (inputs - part) / 2
    mixed = step.parts(
        StepBatch(running, context, part, before, 1 / math.ceil(parts_each)), activation
    )
    mixed_steps = running * parts_each
    if mixed_steps <= outputs:
        round_seconds = outputs * plain.total + mixed_steps * (mixed.total - plain.total)
    else:  # prompts fill every step, and replies wait for them
        round_seconds = mixed_steps * mixed.total
    waiting = (load.concurrency - running) / running * round_seconds
    first = math.ceil(parts_each) * mixed.total + plain.total / 2
    return Served(
        running * outputs / round_seconds,
        waiting + first,
        round_seconds / outputs,
        running,
        plain,
    )
