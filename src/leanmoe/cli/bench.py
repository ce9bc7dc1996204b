"""`leanmoe bench`: throughput and latency over service load from the command line."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from leanmoe.bench.settings import (
    ENGINES,
    BenchSettings,
    Lengths,
    ServiceLoad,
    parse_goodput,
)
from leanmoe.core.parsing import parse_numbers

_DEFAULT = BenchSettings()
_LIMIT = re.compile(r"^(ttft|tpot|e2el|itl):", re.IGNORECASE)


def bench(
    targets: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL|URL...",
            help="A folder, a hub name or 'reference'; or servers' addresses, like "
            "full=http://127.0.0.1:8000 plan=http://127.0.0.1:8001. The first is compared with.",
        ),
    ],
    plan: Annotated[
        list[Path] | None, typer.Option(help="A plan to run beside the full model; repeatable.")
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for results.json and report.html.")
    ] = Path("runs/bench"),
    concurrency: Annotated[
        str, typer.Option(help="Requests at once, comma separated: closed loops.")
    ] = ",".join(map(str, _DEFAULT.concurrency)),
    request_rate: Annotated[
        str | None,
        typer.Option(help="Requests a second, comma separated: open loops, Poisson arrivals."),
    ] = None,
    input_len: Annotated[
        str, typer.Option(help="Prompt tokens: a number, or a range like 512:2048.")
    ] = str(_DEFAULT.input_len),
    output_len: Annotated[
        str, typer.Option(help="Reply tokens: a number, or a range like 16:256.")
    ] = str(_DEFAULT.output_len),
    dataset_path: Annotated[
        str | None,
        typer.Option(help="A .jsonl file with input_len or prompt, and output_len or output."),
    ] = None,
    text: Annotated[
        str | None, typer.Option(help="Where prompts are cut from; see leanmoe tune.")
    ] = None,
    num_prompts: Annotated[
        int | None, typer.Option(help="Of one run; by default 2 x concurrency or more.")
    ] = None,
    repeats: Annotated[
        int, typer.Option(help="Of each run; variants take turns in each.")
    ] = _DEFAULT.repeats,
    max_seconds: Annotated[
        float, typer.Option(help="No run sends requests for longer than this.")
    ] = _DEFAULT.max_seconds,
    max_concurrency: Annotated[
        int, typer.Option(help="Under way at most in an open loop.")
    ] = _DEFAULT.max_concurrency,
    goodput: Annotated[
        list[str] | None,
        typer.Option(help="Limits in ms, like ttft:500 tpot:50; counts requests that keep all."),
    ] = None,
    engine: Annotated[
        str, typer.Option(help="transformers (continuous batching here) or vllm (offline).")
    ] = ENGINES[0],
    engine_args: Annotated[
        str | None, typer.Option(help="For vLLM's engine, as JSON: '{\"enforce_eager\": true}'.")
    ] = None,
    stock: Annotated[
        bool, typer.Option("--stock", help="Also run Transformers' own experts beside.")
    ] = False,
    tokenizer: Annotated[
        str | None, typer.Option(help="Of the served model: a folder, hub name or 'reference'.")
    ] = None,
    served_model: Annotated[
        str | None, typer.Option(help="The name that servers know the model by.")
    ] = None,
    gpus: Annotated[
        int | None, typer.Option(help="GPUs of one server or engine, for tok/s/GPU.")
    ] = None,
    allow_remote: Annotated[
        bool, typer.Option("--allow-remote", help="Send the load to another machine.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of every draw and order.")] = _DEFAULT.seed,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Allow the model's own Python code to run.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what --output holds.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead.")] = False,
) -> None:
    """Measure throughput and latency over load: full model and plans take turns in the same run.

    Example:
    leanmoe bench reference --plan plan.json --input-len 256 --output-len 32
    """
    # `--goodput ttft:500 tpot:50`, as vLLM has it: the words after the first arrive as targets.
    limits = [*(goodput or []), *(word for word in targets if _LIMIT.match(word))]
    settings = BenchSettings(
        concurrency=() if request_rate else parse_numbers("--concurrency", concurrency, int),
        request_rate=parse_numbers("--request-rate", request_rate, float) if request_rate else (),
        input_len=Lengths.parse("--input-len", input_len, 1),
        output_len=Lengths.parse("--output-len", output_len, 2),
        dataset_path=dataset_path,
        text=text,
        num_prompts=num_prompts,
        repeats=repeats,
        max_seconds=max_seconds,
        max_concurrency=max_concurrency,
        goodput=parse_goodput(limits),
        seed=seed,
    )
    from leanmoe.bench.run import Job, run_job

    job = Job(
        targets=tuple(word for word in targets if not _LIMIT.match(word)),
        plans=tuple(plan or ()),
        settings=settings,
        output=output,
        command="leanmoe " + " ".join(sys.argv[1:]),
        engine=engine,
        tokenizer=tokenizer,
        served_model=served_model,
        allow_remote=allow_remote,
        gpus=gpus,
        with_stock=stock,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        overwrite=overwrite,
        engine_args=engine_args,
    )
    from leanmoe.report.write import write_page

    page = output / "report.html"

    def shown(record: Any, load: ServiceLoad) -> None:
        if not as_json:
            _show(record.entry(load), settings.confidence)

    record = run_job(job, shown, lambda results: write_page(results.parent, page))
    if as_json:
        print(json.dumps(record.to_json()))
        return
    for note in record.notes:
        print(note)
    print(f"Results: {record.path}   Page: {page}")


def _show(entry: dict[str, Any], confidence: float) -> None:
    from leanmoe.bench.one_block import block

    print(block(entry, confidence))
    print()
