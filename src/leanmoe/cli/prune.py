"""`leanmoe prune`: a checkpoint, or a plan, with fewer experts in total."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from leanmoe.cli.options import AsJson, print_json
from leanmoe.cli.verb import command_line
from leanmoe.prune.settings import PruneSettings


def prune(
    settings: PruneSettings,
    output: Annotated[Path, typer.Option("--output", "-o", help="A new folder to write to.")],
    as_json: AsJson = False,
) -> None:
    """Leave out the experts that matter least; stock engines load what is written.

    Example:
    leanmoe prune reference --keep 75% --criterion reap -o pruned
    """
    from leanmoe.prune.run import prune as run

    pruned = run(settings, output, command_line())
    counts = sorted({len(experts) for experts in pruned.kept})
    count = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    if as_json:
        print_json(
            {
                "output": str(pruned.output),
                "settings": asdict(settings),
                "kept": pruned.kept,
                "protected": pruned.protected,
                "bytes_before": pruned.bytes_before,
                "bytes_after": pruned.bytes_after,
                "trial": pruned.trial,
                "label": "measured",
            }
        )
        return
    saved = 1 - pruned.bytes_after / pruned.bytes_before
    print(f"{count} of {pruned.experts} experts remain in each of {len(pruned.kept)} layers")
    if pruned.protected:
        names = ", ".join(f"layer {layer} expert {e}" for layer, e in pruned.protected)
        print(f"Kept for their extreme outputs: {names}")
    what = "The plan" if settings.as_plan else f"The checkpoint, {saved:.0%} smaller"
    print(f"{what}: {pruned.output}")
    if pruned.trial is not None:
        print(pruned.trial)
    print("What it costs is not known yet: measure it before you serve it.")
