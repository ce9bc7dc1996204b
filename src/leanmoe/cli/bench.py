"""`leanmoe bench`: throughput and latency over service load from the command line."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from leanmoe.bench.settings import BenchSettings, ServiceLoad, parse_goodput
from leanmoe.cli.options import AsJson, Output, Overwrite, print_json
from leanmoe.cli.verb import command_line

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
    settings = _with_limits(settings)
    from leanmoe.bench.run import Job, run_job

    job = Job(
        targets=settings.targets,
        plans=settings.plan,
        settings=settings,
        output=output,
        command=command_line(),
        engine=settings.engine,
        tokenizer=settings.tokenizer,
        served_model=settings.served_model,
        allow_remote=settings.allow_remote,
        gpus=settings.gpus,
        with_stock=settings.stock,
        dtype=settings.dtype,
        trust_remote_code=settings.trust_remote_code,
        overwrite=overwrite,
        engine_args=settings.engine_args,
    )
    from leanmoe.report.write import write_page

    page = output / "report.html"

    def shown(record: Any, load: ServiceLoad) -> None:
        if not as_json:
            _show(record.entry(load), settings.confidence)

    record = run_job(job, shown, lambda results: write_page(results.parent, page))
    if as_json:
        print_json(record.to_json())
        return
    for note in record.notes:
        print(note)
    print(f"Results: {record.path}   Page: {page}")


def _with_limits(settings: BenchSettings) -> BenchSettings:
    """With `--goodput ttft:500 tpot:50`, as vLLM has it: words after the first come as targets."""
    limits = [word for word in settings.targets if _LIMIT.match(word)]
    targets = tuple(word for word in settings.targets if word not in limits)
    more = [limit for word in limits for limit in parse_goodput("--goodput", word)]
    return replace(settings, targets=targets, goodput=(*settings.goodput, *more))


def _show(entry: dict[str, Any], confidence: float) -> None:
    from leanmoe.bench.one_block import block

    print(block(entry, confidence))
    print()
