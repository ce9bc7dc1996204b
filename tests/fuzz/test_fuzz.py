"""A thousand damaged inputs, always the same ones; and that the fuzz would see a fault."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import Phase

from leanmoe.core.errors import LeanMoeError
from tests.fuzz import judge as judging
from tests.fuzz.judge import Verdict, judge
from tests.fuzz.readers import KINDS, one_line, sane
from tests.fuzz.run import INPUTS, counted, drawn, shares


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_inputs_end_in_a_result_or_in_one_line(kind: str) -> None:
    def check(_kind: str, content: bytes, verdict: Verdict) -> None:
        assert verdict.ending != "fault", f"{verdict.words}\n{content[:2000]!r}"

    drawn(kind, shares(INPUTS)[kind], check, (Phase.generate, Phase.shrink))


@pytest.mark.parametrize("kind", KINDS)
def test_seeds_as_they_are_give_results(kind: str) -> None:
    """Of some that are replies with an error, or prompts of a form that is not read, one does."""
    seeds = KINDS[kind][0]()
    value = seeds.values[0]
    lines = "\n".join(map(json.dumps, value)) if seeds.is_lines else json.dumps(value)
    assert judge(kind, (value if seeds.is_text else lines).encode()) == Verdict("result")


def test_the_shares_are_all_of_the_inputs() -> None:
    assert sum(shares(INPUTS).values()) == INPUTS


def read_with(monkeypatch: pytest.MonkeyPatch, code: str) -> Verdict:
    """What becomes of an input whose reader does this."""

    def read(*_: object) -> None:
        exec(code, {"LeanMoeError": LeanMoeError, "time": time, "sane": sane})

    monkeypatch.setattr(judging, "KINDS", {"rules in words": (None, read, 1)})
    return judge("rules in words", b"")


@pytest.mark.parametrize(
    ("code", "ending", "words"),
    [
        ("pass", "result", ""),
        ("raise LeanMoeError('k is 3: it must be 2')", "refusal", "k is 3"),
        ("raise LeanMoeError('x ' * 2500)", "fault", "5000 letters"),
        ("{}['a']", "fault", "KeyError"),
        ("sane({'bytes': -1.0})", "fault", "bytes is -1"),
        ("sane([float('nan')])", "fault", "is nan"),
        ("while True: pass", "fault", "HangError"),
        ("[0] * 10**10", "fault", "MemoryError"),
    ],
)
def test_the_fuzz_sees_faults(
    monkeypatch: pytest.MonkeyPatch, code: str, ending: str, words: str
) -> None:
    monkeypatch.setattr(judging, "SECONDS", 0.2)
    verdict = read_with(monkeypatch, code)
    assert verdict.ending == ending
    assert words in verdict.words


def test_inputs_are_counted_and_always_the_same() -> None:
    first, second = counted("rules in words", 30), counted("rules in words", 30)
    assert {**first, "seconds": 0} == {**second, "seconds": 0}
    assert first["inputs"] == first["results"] + first["refusals"] == 30
    with pytest.raises(AssertionError):
        one_line(LeanMoeError(""))
