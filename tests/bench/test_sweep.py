"""The sweep and its record: turns are interleaved, what is measured is kept whatever happens."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from leanmoe.bench.measurement import Request, Timeline
from leanmoe.bench.one_block import block
from leanmoe.bench.prompts import Supply
from leanmoe.bench.settings import BenchSettings, Lengths, ServiceLoad
from leanmoe.bench.sweep import Outcome, Record, RunOne, sweep
from leanmoe.core.errors import LeanMoeError

SETTINGS = BenchSettings(
    concurrency=(1, 4), input_len=Lengths(4, 4), output_len=Lengths(5, 5), repeats=3, num_prompts=4
)


class Fake:
    """A service that is twice as fast under the plan, until it breaks."""

    def __init__(self, restarts: bool = False, breaks_at: int | None = None) -> None:
        self.restarts, self.breaks_at = restarts, breaks_at
        self.beside: frozenset[str] = frozenset()
        self.calls: list[tuple[str, str]] = []
        self.prompts: dict[tuple[str, str], list[tuple[int, ...]]] = {}
        self.is_closed = False

    @contextmanager
    def at(self, load: ServiceLoad) -> Iterator[RunOne]:  # noqa: ARG002, the protocol's name
        yield self.run_one

    def run_one(
        self, name: str, _load: ServiceLoad, requests: Sequence[Request], seed: str
    ) -> Outcome:
        self.calls.append((name, seed))
        if self.breaks_at is not None and len(self.calls) > self.breaks_at:
            raise LeanMoeError("the server stopped answering")
        self.prompts[name, seed] = [r.prompt for r in requests]
        step = 0.1 if name == "full" else 0.05
        return Outcome(
            [
                Timeline(
                    float(n),
                    tuple(n + step * (t + 1) for t in range(r.output_tokens)),
                    len(r.prompt),
                    r.output_tokens,
                )
                for n, r in enumerate(requests)
            ],
            failed=1,
        )

    def routing(
        self,
        load: ServiceLoad,  # noqa: ARG002
        run_one: RunOne,  # noqa: ARG002
    ) -> dict[str, Any]:
        return {"full": {"distinct_experts_a_step": 9.0}}

    def describe(self) -> dict[str, Any]:
        return {"engine": "fake"}

    def variants(self) -> list[dict[str, Any]]:
        return [{"name": "full"}, {"name": "plan"}]

    def close(self) -> None:
        self.is_closed = True


def run(fake: Fake, path: Path, settings: BenchSettings = SETTINGS) -> dict[str, Any]:
    supply = Supply(range(1000), settings.input_len, settings.output_len)
    record = Record(path, settings, fake.variants(), fake.describe())
    shown: list[ServiceLoad] = []
    try:
        sweep(fake, supply, settings, record, shown.append)
    finally:
        assert fake.is_closed
    assert shown == list(settings.loads())
    written: dict[str, Any] = json.loads(path.read_text())
    return written


@pytest.mark.parametrize("restarts", [False, True])
def test_variants_take_turns_on_the_same_requests(tmp_path: Path, restarts: bool) -> None:
    fake = Fake(restarts)
    found = run(fake, tmp_path / "results.json")
    assert found["complete"]
    assert found["stopped"] is None
    for load in ("1 at once", "4 at once"):
        for repeat in range(3):
            seed = f"0 {load} {repeat}"
            assert fake.prompts["full", seed] == fake.prompts["plan", seed]
    timed = [name for name, seed in fake.calls if seed != "warm"]
    assert timed.count("full") == timed.count("plan") == 6
    assert timed != sorted(timed), "not one variant after the other"
    entry = found["loads"][1]
    assert (entry["max_concurrency"], entry["num_prompts"]) == (4, 4)
    assert [r["repeat"] for r in entry["runs"]["plan"]] == [0, 1, 2]
    assert entry["median"]["full"]["median_tpot_ms"] == pytest.approx(100)
    assert entry["gain"]["plan"]["median_tpot_ms"]["median"] == pytest.approx(0.5)
    assert entry["gain"]["plan"]["output_throughput"]["low"] > 1


def test_ctrl_c_keeps_what_was_measured(tmp_path: Path) -> None:
    class Interrupted(Fake):
        def run_one(self, *arguments: object) -> Outcome:
            if len(self.calls) == 4:
                raise KeyboardInterrupt
            return super().run_one(*arguments)  # type: ignore[arg-type]

    path = tmp_path / "results.json"
    with pytest.raises(KeyboardInterrupt):
        run(Interrupted(), path)
    assert json.loads(path.read_text())["stopped"] == "interrupted"


def test_what_was_measured_stays_and_says_why_it_ended(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    with pytest.raises(LeanMoeError, match="stopped answering"):
        run(Fake(breaks_at=12), path)
    found = json.loads(path.read_text())
    assert found["complete"] is False
    assert found["stopped"] == "the server stopped answering"
    assert len(found["loads"]) == 2
    assert len(found["loads"][0]["runs"]["full"]) == 3
    assert sum(len(runs) for runs in found["loads"][1]["runs"].values()) == 2


def test_a_killed_bench_left_a_file_that_says_so(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    Record(path, SETTINGS, [{"name": "full"}], {}).save()
    stored = json.loads(path.read_text())
    assert stored["complete"] is False
    assert "killed" in stored["stopped"]


def test_one_repeat_claims_no_gain(tmp_path: Path) -> None:
    settings = BenchSettings(**{**vars(SETTINGS), "repeats": 1})
    found = run(Fake(), tmp_path / "results.json", settings)
    assert found["loads"][0]["gain"] == {}
    assert "no gain is claimed" in block(found["loads"][0], 0.95)
