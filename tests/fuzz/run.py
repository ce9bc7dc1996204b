"""So many inputs of a kind, drawn by hypothesis, and what became of them."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.fuzz.judge import Verdict, judge
from tests.fuzz.mutations import damaged
from tests.fuzz.readers import KINDS

INPUTS = 1000
"""Of a round: all that CI reads."""
Check = Callable[[str, bytes, Verdict], None]


def drawn(kind: str, inputs: int, check: Check, phases: tuple[Phase, ...], number: int = 0) -> None:
    """Judges inputs of a kind, of one `number` always the same ones; hands each to `check`."""
    seeds, _, _ = KINDS[kind]

    @seed(number)
    @settings(
        max_examples=inputs,
        database=None,
        deadline=None,
        phases=phases,
        suppress_health_check=list(HealthCheck),
    )
    @given(damaged(seeds()))
    def run(content: bytes) -> None:
        check(kind, content, judge(kind, content))

    run()


def shares(inputs: int) -> dict[str, int]:
    """How many inputs of each kind there are among all."""
    return {kind: max(1, inputs * share // 100) for kind, (_, _, share) in KINDS.items()}


def counted(kind: str, inputs: int, number: int = 0) -> dict[str, Any]:
    """How inputs of a kind ended, the seconds they took, and one input of each fault."""
    endings: Counter[str] = Counter()
    faults: Counter[str] = Counter()
    inputs_of: dict[str, bytes] = {}

    def note(_kind: str, content: bytes, verdict: Verdict) -> None:
        endings[verdict.ending] += 1
        if verdict.ending == "fault":
            faults[verdict.words] += 1
            known = inputs_of.get(verdict.words, content)
            inputs_of[verdict.words] = min(known, content, key=len)

    started = time.process_time()
    drawn(kind, inputs, note, (Phase.generate,), number)
    return {
        "inputs": endings.total(),
        "results": endings["result"],
        "refusals": endings["refusal"],
        "faults": endings["fault"],
        "seconds": round(time.process_time() - started, 1),
        "found": [
            {"what": what, "times": times, "input": shown(inputs_of[what])}
            for what, times in faults.most_common()
        ],
    }


def shown(content: bytes) -> str:
    """The start of an input, as a results file holds it."""
    return content[:2000].decode("utf-8", "replace")
