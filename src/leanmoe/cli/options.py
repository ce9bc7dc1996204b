"""Options that several commands have, each defined once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(help="A folder, a hub name, or 'reference'.")]
RunOutput = Annotated[Path, typer.Option("--output", "-o", help="The run's folder.")]
Seed = Annotated[int, typer.Option(help="Of every shuffle and draw.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Allow the model's own Python code to run.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a run with other settings.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead.")]
