"""What a bench may be asked, and what it says to anything else."""

from __future__ import annotations

import random
from typing import Any

import pytest

from leanmoe.bench.settings import (
    BenchSettings,
    Lengths,
    parse_arguments,
    parse_goodput,
    requests_for,
)
from leanmoe.core.errors import LeanMoeError


def test_lengths_are_one_or_any_of_a_range() -> None:
    assert Lengths.parse("--input-len", "1024", 1) == Lengths(1024, 1024)
    assert str(Lengths.parse("--input-len", "512:2048", 1)) == "512:2048"
    rng = random.Random(0)
    drawn = {Lengths(3, 6).draw(rng) for _ in range(200)}
    assert drawn == {3, 4, 5, 6}


@pytest.mark.parametrize("text", ["", "ten", "5:3", "0", "1:2:3", "2000000", "-4:8", "1.5"])
def test_bad_lengths_are_refused(text: str) -> None:
    with pytest.raises(LeanMoeError, match="--input-len is"):
        Lengths.parse("--input-len", text, 1)


def test_goodput_as_vllm_writes_it() -> None:
    assert parse_goodput("--goodput", "ttft:500 tpot:50") == [("ttft", 500.0), ("tpot", 50.0)]
    assert parse_goodput("--goodput", "ttft:500,e2el:2e3") == [("ttft", 500.0), ("e2el", 2000.0)]


def test_an_engines_arguments_are_quoted_as_in_a_shell() -> None:
    words = ("--hf-overrides", '{"a": 1}')
    assert parse_arguments("--engine-args", "--hf-overrides '{\"a\": 1}'") == words
    with pytest.raises(LeanMoeError, match=r"--engine-args is .*No closing quotation"):
        parse_arguments("--engine-args", "--hf-overrides '{")


@pytest.mark.parametrize("word", ["itl:5", "ttft", "ttft:x", "ttft:-1", "ttft:nan", "tpot:inf"])
def test_bad_goodput_is_refused(word: str) -> None:
    with pytest.raises(LeanMoeError, match="--goodput has"):
        parse_goodput("--goodput", word)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"concurrency": (4, 2)}, "--concurrency is 4,2"),
        ({"concurrency": (0,)}, "--concurrency is 0"),
        ({"concurrency": (100_000,)}, "at most 4096"),
        ({"concurrency": (), "request_rate": (-1.0,)}, "--request-rate is -1"),
        ({"concurrency": ()}, "no load"),
        ({"repeats": 0}, "--repeats is 0"),
        ({"max_seconds": 1e9}, "--max-seconds"),
        ({"num_prompts": 4}, "at least the largest concurrency"),
        ({"num_prompts": 1_000_000}, "--num-prompts"),
        ({"max_concurrency": 0}, "--max-concurrency"),
    ],
)
def test_what_is_out_of_range_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(LeanMoeError, match=message):
        BenchSettings(**change).check()


def test_loads_and_their_requests() -> None:
    loads = BenchSettings(concurrency=(1, 64, 512)).loads()
    assert [load.requests for load in loads] == [requests_for(n) for n in (1, 64, 512)]
    assert requests_for(512) == 1024
    rates = BenchSettings(concurrency=(), request_rate=(1.0, 2.0), num_prompts=10).loads()
    assert [(load.rate, load.requests, load.concurrency) for load in rates] == [
        (1.0, 10, None),
        (2.0, 10, None),
    ]
