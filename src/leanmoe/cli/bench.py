"""`leanmoe bench`: throughput and latency over service load from the command line."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from leanmoe.bench.settings import BenchSettings, parse_goodput
from leanmoe.cli.options import AsJson, Output, Overwrite, print_json
from leanmoe.cli.verb import command_line
from leanmoe.core.files import read_json

_LIMIT = re.compile(r"^(ttft|tpot|e2el|itl):", re.IGNORECASE)


def bench(
    settings: BenchSettings,
    output: Output = Path("runs/bench"),
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Measure throughput and latency over load: full model and plans take turns in the same run.

    Example:
    leanmoe bench reference --plan plan.json --input-len 256 --output-len 32
    """
    from leanmoe.bench.one_block import block
    from leanmoe.bench.run import RESULTS
    from leanmoe.bench.run import bench as run
    from leanmoe.report.write import write_page

    page = output / "report.html"

    def shown(load: dict[str, Any]) -> None:
        if not as_json:
            print(block(load, settings.confidence), end="\n\n")

    results = run(
        _with_limits(settings),
        output,
        command_line(),
        overwrite,
        shown,
        lambda: write_page(output, page),
    )
    if as_json:
        print_json(read_json(output / RESULTS, results.WHAT))
        return
    for note in results.notes:
        print(note)
    print(f"Results: {output / RESULTS}   Page: {page}")


def _with_limits(settings: BenchSettings) -> BenchSettings:
    """With `--goodput ttft:500 tpot:50`, as vLLM has it: words after the first come as targets."""
    limits = [word for word in settings.targets if _LIMIT.match(word)]
    targets = tuple(word for word in settings.targets if word not in limits)
    more = [limit for word in limits for limit in parse_goodput("--goodput", word)]
    return replace(settings, targets=targets, goodput=(*settings.goodput, *more))
