"""`leanmoe prune`: a checkpoint, or a plan, with fewer experts in total."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from leanmoe.cli.options import AsJson, Dtype, Model, Seed, TrustRemoteCode
from leanmoe.core.errors import LeanMoeError

CRITERIA = (
    "random, odd, even, first-half, last-half, activate-count, soft-count (arXiv 2505.03531), "
    "reap, easy-ep, output-sum or output-error"
)


def prune(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="A new folder.")],
    keep: Annotated[str, typer.Option(help="Share or number of a layer's experts.")] = "75%",
    criterion: Annotated[str, typer.Option(help=CRITERIA + ".")] = "reap",
    text: Annotated[
        str | None,
        typer.Option(help="A .txt or .jsonl file, a folder, or a Hugging Face data set."),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Of calibration text.")] = 32768,
    seed: Seed = 0,
    protect: Annotated[
        bool, typer.Option(help="Keep experts with extreme outputs whatever their score.")
    ] = True,
    plan: Annotated[
        bool, typer.Option("--plan", help="Write plan.json and touch no weights.")
    ] = False,
    allocation: Annotated[
        str, typer.Option(help="even, or evoesap: layers of a plan keep different numbers.")
    ] = "even",
    dtype: Dtype = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Leave out the experts that matter least; stock engines load what is written.

    A run that was stopped goes on where it was.

    Example:
    leanmoe prune reference --keep 75% --criterion reap -o pruned
    """
    if tokens < 16:
        raise LeanMoeError(f"--tokens is {tokens}: it must be at least 16")
    from leanmoe.prune.run import PruneSettings
    from leanmoe.prune.run import prune as run

    settings = PruneSettings(
        model,
        keep,
        criterion,
        text,
        tokens,
        seed,
        protect,
        plan,
        allocation,
        dtype,
        trust_remote_code,
    )
    found = run(settings, output)
    counts = sorted({len(experts) for experts in found.kept})
    count = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    if as_json:
        print(
            json.dumps(
                {
                    "output": str(found.output),
                    "settings": asdict(settings),
                    "kept": found.kept,
                    "protected": found.protected,
                    "bytes_before": found.bytes_before,
                    "bytes_after": found.bytes_after,
                    "label": "measured",
                }
            )
        )
        return
    saved = 1 - found.bytes_after / found.bytes_before
    print(f"{count} of {found.shape.experts} experts remain in each of {len(found.kept)} layers")
    if found.protected:
        names = ", ".join(f"layer {layer} expert {e}" for layer, e in found.protected)
        print(f"Kept for their extreme outputs: {names}")
    what = "The plan" if plan else f"The checkpoint, {saved:.0%} smaller"
    print(f"{what}: {found.output}")
    print("What it costs is not known yet: measure it before you serve it.")
