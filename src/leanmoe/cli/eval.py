"""`leanmoe eval`: what plans cost on tasks, replies and texts, beside the full model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from leanmoe.cli.options import AsJson, Dtype, Model, Overwrite, RunOutput, Seed, TrustRemoteCode
from leanmoe.core.errors import LeanMoeError
from leanmoe.core.parsing import parse_share
from leanmoe.eval.settings import EvalSettings
from leanmoe.results.eval import EvalResults

_DEFAULT = EvalSettings(model="reference")


def eval(
    model: Model,
    plan: Annotated[list[Path] | None, typer.Option(help="A plan's file; may be repeated.")] = None,
    rule: Annotated[
        list[str] | None,
        typer.Option(help="A rule for every layer, like top_k=6,keep_weights; may be repeated."),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Comma separated: lm-evaluation-harness's, and with --data blimp, lambada, piqa, "
            f"qasc. By default {', '.join(_DEFAULT.tasks)}; 'none' for none.",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="A folder with files of blimp, lambada, piqa, qasc.")
    ] = None,
    include_path: Annotated[
        str | None, typer.Option(help="A folder with lm-evaluation-harness tasks of your own.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Questions of each task, and prompts, at most.")
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(help="Examples before each harness question.")
    ] = None,
    concurrency: Annotated[
        int, typer.Option(help="Requests that decode together in your service.")
    ] = _DEFAULT.concurrency,
    batch_draws: Annotated[
        int, typer.Option(help="Runs in other company, for rules that depend on it.")
    ] = _DEFAULT.batch_draws,
    margin: Annotated[
        str, typer.Option(help="Largest loss of accuracy to accept, in percentage points.")
    ] = f"{100 * _DEFAULT.margin:g}",
    confidence: Annotated[float, typer.Option(help="Of every interval.")] = _DEFAULT.confidence,
    engine: Annotated[
        str, typer.Option(help="transformers, or vllm with leanmoe's plugin (harness tasks only).")
    ] = _DEFAULT.engine,
    prompts: Annotated[
        str | None,
        typer.Option(help="A .jsonl file of prompts, with answers or without, to reply to."),
    ] = None,
    output_len: Annotated[int, typer.Option(help="Of each reply.")] = _DEFAULT.output_len,
    samples: Annotated[
        int, typer.Option(help="Replies drawn per prompt with an answer: pass@1 to pass@n.")
    ] = _DEFAULT.samples,
    temperature: Annotated[float, typer.Option(help="Of drawn replies.")] = _DEFAULT.temperature,
    domain: Annotated[
        list[str] | None, typer.Option(help="NAME=FILE, a text to test on; may be repeated.")
    ] = None,
    calibrate: Annotated[
        str | None,
        typer.Option(help="CRITERION:KEEP, like easy-ep:75%: a plan ranked on each domain."),
    ] = None,
    domain_tokens: Annotated[
        int, typer.Option(help="Tokens of each domain to test on, and to rank on.")
    ] = _DEFAULT.domain_tokens,
    output: RunOutput = Path("runs/eval"),
    seed: Seed = _DEFAULT.seed,
    dtype: Dtype = None,
    trust_remote_code: TrustRemoteCode = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Compare plans with the full model on tasks, replies and texts, question by question.

    A run that was stopped goes on where it was; more plans can be added to it.

    Example:
    leanmoe eval reference --rule top_k=6,keep_weights --tasks piqa --data FOLDER
    """
    settings = EvalSettings(
        model=model,
        tasks=_tasks(tasks),
        data=data,
        include_path=include_path,
        limit=limit,
        num_fewshot=num_fewshot,
        concurrency=concurrency,
        batch_draws=batch_draws,
        margin=parse_share("--margin", margin, in_points=True),
        confidence=confidence,
        engine=engine,
        prompts=prompts,
        output_len=output_len,
        samples=samples,
        temperature=temperature,
        domains=_domains(domain or []),
        calibrate=calibrate,
        domain_tokens=domain_tokens,
        seed=seed,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    from leanmoe.eval.run import RESULTS, evaluate
    from leanmoe.report.write import write_page

    command = "leanmoe " + " ".join(sys.argv[1:])
    folder = evaluate(settings, plan or [], rule or [], output, command, overwrite)
    results = EvalResults.read(folder / RESULTS)
    write_page(folder)
    if as_json:
        print(json.dumps({"run": str(folder), **results.to_json()}))
        return
    _show(results, folder)


def _show(results: EvalResults, folder: Path) -> None:
    from rich.console import Console

    from leanmoe.eval.run import MEAN
    from leanmoe.report.eval_tables import console_tables

    console = Console(highlight=False)
    for table in console_tables(results, console):
        console.print(table)
    for row in results.tasks:
        if row.task == MEAN or len({each.task for each in results.tasks}) == 1:
            console.print(f"{row.plan}, {row.task}: {row.verdict.reason}.")
    console.print(f"Results: {folder / 'results.json'}   Page: {folder / 'report.html'}")


def _tasks(text: str | None) -> tuple[str, ...]:
    if text is None:
        return _DEFAULT.tasks
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    return () if names == ("none",) else names


def _domains(texts: list[str]) -> tuple[tuple[str, str], ...]:
    found = []
    for text in texts:
        name, _, file = text.partition("=")
        if not name or not file:
            raise LeanMoeError(f"--domain is {text!r}: it must be NAME=FILE")
        found.append((name, file))
    return tuple(found)
