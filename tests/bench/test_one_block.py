"""The console block reads as that of `vllm bench serve`."""

from __future__ import annotations

from pathlib import Path

from leanmoe.bench.one_block import block
from tests.bench.test_sweep import Fake, run


def test_the_block_reads_as_vllms(tmp_path: Path) -> None:
    entry = run(Fake(), tmp_path / "results.json")["loads"][0]
    text = block(entry, 0.8)
    assert "(80%: " in text
    assert "95%" not in text
    for row in (
        "Serving Benchmark Result",
        "Successful requests:",
        "Failed requests:",
        "Maximum request concurrency:",
        "Benchmark duration (s):",
        "Total input tokens:",
        "Total generated tokens:",
        "Request throughput (req/s):",
        "Output token throughput (tok/s):",
        "Total token throughput (tok/s):",
        "Time to First Token",
        "Mean TTFT (ms):",
        "Median TPOT (ms):",
        "P90 ITL (ms):",
        "P99 E2EL (ms):",
        "Time per Output Token (excl. 1st token)",
        "Inter-token Latency",
        "End-to-end Latency",
    ):
        assert row in text
    widths = {len(line) for line in text.splitlines() if line[:1] in "=-"}
    assert len(widths) == 1
    (line,) = [line for line in text.splitlines() if line.startswith("Median TPOT")]
    assert line.split()[-2:] == ["100.00", "50.00"]
    assert "A gain." in text
    assert "Request goodput" not in text, "no limits were given"
