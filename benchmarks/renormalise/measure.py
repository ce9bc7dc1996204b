"""Which `renormalise` loses least: two routers, with and without shared expert, two seeds.

    python -m benchmarks.renormalise.measure --data DATA

README.md of this folder is the plan. `DATA` is a folder made by reference_model.prepare.
Shape suffixes: S sequences, N tokens of a sequence, X tokens of a batch, V vocabulary, U documents,
F factors.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch.nn.functional import cross_entropy

from benchmarks.common.results import collect, file_of, parser_of, write
from benchmarks.renormalise.cells import Cell, cells_of
from benchmarks.renormalise.gate import Routed, install, projections
from leanmoe.core.errors import LeanMoeError
from leanmoe.core.files import read_json
from leanmoe.models.routers import Scoring
from leanmoe.plan import Rule
from reference_model.architecture import DeepseekV3Settings, ModelSettings
from reference_model.train import Log, Trainer, TrainSettings, loop

Floats = NDArray[np.float64]
VALUES = (-0.25, 0.0, 0.25, 0.5, 0.75, 1.0)
LEFT = 6
"""Experts left where the projection is measured."""
FACTORS = tuple(round(0.8 + 0.02 * n, 2) for n in range(21))
"""On the logits, for their calibration."""
MOST_PASSES = 3.0
WIDTH = 150
"""Of the tables that are printed."""
GROUPS = 1
ROUTERS: tuple[Scoring, ...] = ("sigmoid", "softmax")


@dataclass(frozen=True)
class Variant:
    """One model to train."""

    scoring: Scoring
    shared: int
    seed: int


def rules_of(settings: ModelSettings) -> dict[str, Rule]:
    """The rules by name; for 8 experts a token 6, 4, and 3 guaranteed."""
    k = settings.top_k
    counts = (3 * k // 4, k // 2)
    rules = {f"{count} of {k}": Rule(top_k=count) for count in counts}
    return rules | {f"{3 * k // 8} guaranteed": Rule(guaranteed=3 * k // 8)}


def trained(
    variant: Variant, given: argparse.Namespace, sizes: DeepseekV3Settings, settings: TrainSettings
) -> Trainer:
    """A model of the variant after its tokens or passes, whichever ends first."""
    sizes = replace(sizes, shared_experts=variant.shared, groups=GROUPS, groups_used=GROUPS)
    settings = replace(settings, model=sizes, seed=variant.seed)
    out = Path(tempfile.mkdtemp(prefix="renormalise-"))
    trainer = Trainer(given.data, out, settings, given.device)
    install(trainer.model, variant.scoring, sizes.context)
    most = int(MOST_PASSES * trainer.windows.ids.numel())
    trainer.settings = replace(settings, tokens=min(settings.tokens, most))
    log = Log(out / "log.jsonl")
    loop(trainer, log, time.monotonic(), math.inf, 0.0)
    trainer.model.eval()
    return trainer


@torch.no_grad()
def losses(trainer: Trainer, factors: Sequence[float] = (1.0,)) -> tuple[Floats, Floats]:
    """Loss (F,U) of the dev slice's documents for each factor on the logits; their tokens (U)."""
    documents, each, before = [], [], 0
    for inputs_SN, targets_SN in trainer.dev:
        hidden = trainer.model.model(input_ids=inputs_SN, use_cache=False).last_hidden_state
        logits_XV = trainer.model.lm_head(hidden).float().flatten(0, 1)
        targets_X = targets_SN.flatten()
        by_factor = [cross_entropy(logits_XV * f, targets_X, reduction="none") for f in factors]
        each.append(torch.stack(by_factor).double().cpu().numpy())
        # Every document begins with the separator, id 0.
        numbers_X = (inputs_SN == 0).flatten().long().cumsum(0).cpu().numpy() + before
        before = int(numbers_X[-1])
        documents.append(numbers_X)
    numbers_X, loss_FX = np.concatenate(documents), np.concatenate(each, axis=1)
    loss_FU = np.stack([np.bincount(numbers_X, row).astype(np.float64) for row in loss_FX])
    return loss_FU, np.bincount(numbers_X).astype(np.float64)


def measured(variant: Variant, trainer: Trainer, routed: Routed) -> dict[str, Any]:
    """The full model, its predictors, then every rule and value."""
    routed.rule = Rule()
    loss_FU, tokens_U = losses(trainer, (1.0, *FACTORS))
    means_F = loss_FU.sum(1) / tokens_U.sum()
    calibration = dict(zip(FACTORS, means_F[1:].tolist(), strict=True))
    projection = projections(trainer.model, trainer.dev[0][0], routed, LEFT)
    lost: dict[str, dict[str, list[float]]] = {}
    for name, rule in rules_of(trainer.settings.model).items():
        lost[name] = {}
        for a in VALUES:
            # Beyond what a plan allows: route takes it as it is.
            routed.rule = replace(rule, renormalise=a)
            lost[name][str(a)] = losses(trainer)[0][0].tolist()
    return {
        "router": variant.scoring,
        "shared_experts": variant.shared,
        "seed": variant.seed,
        "trained_tokens": trainer.tokens,
        "passes": trainer.tokens / trainer.windows.ids.numel(),
        "busiest_over_mean": _last(trainer.out / "log.jsonl")["max_over_mean_load"],
        "full": loss_FU[0].tolist(),
        "tokens": tokens_U.tolist(),
        "calibration": calibration,
        "best_factor": min(calibration, key=calibration.__getitem__),
        "projection": projection,
        "loss": lost,
    }


def _last(log: Path) -> dict[str, Any]:
    """The last line of a log."""
    line: dict[str, Any] = json.loads(log.read_text().splitlines()[-1])
    return line


def show(models: Sequence[dict[str, Any]], cells: Sequence[Cell]) -> None:
    """Prints the increase of loss by model, rule and value, then the tests."""
    table = Table("model", "rule", *(f"a = {a:g}" for a in VALUES), "factor", "projection")
    for model in models:
        full = sum(model["full"])
        for rule, by_value in model["loss"].items():
            rises = [f"{100 * (sum(by_value[str(a)]) / full - 1):+.2f}%" for a in VALUES]
            name = f"{model['router']}, shared {model['shared_experts']}, seed {model['seed']}"
            mean = float(np.mean(model["projection"]))
            table.add_row(name, rule, *rises, f"{model['best_factor']:g}", f"{mean:.2f}")
    words = ("cell", "rule", "kept less anew", "Holm p", "between less the better end", "Holm p")
    tests = Table(*words)
    for cell in cells:
        kept = ", ".join(f"{100 * x:+.2f}%" for x in cell.kept_less_anew)
        between = ", ".join(f"{100 * x:+.2f}% (a = {a:g})" for a, x in cell.between_less_end)
        p_values = f"{cell.p_kept:.2g}", f"{cell.p_between:.2g}"
        tests.add_row(cell.model, cell.rule, kept, p_values[0], between, p_values[1])
    console = Console(width=WIDTH)
    console.print(table)
    console.print(tests)


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains and measures every model, writes JSON, prints tables."""
    parser = parser_of(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder made by prepare")
    parser.add_argument("--tokens", type=int, default=170_000_000, help="of training, a model")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--join", type=Path, help="results of other seeds: tested together")
    parser.add_argument("--dev-batches", type=int, help="batches of the dev slice; not set: all")
    parser.add_argument("--tiny", action="store_true", help="very small models: tries the program")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args(arguments)
    made = collect(seed=0)
    settings = TrainSettings(tokens=given.tokens, compile=not given.tiny)
    sizes = DeepseekV3Settings()
    if given.tiny:
        sizes = tiny(given.data)
        settings = replace(settings, sequences=16, log_every=50)
    models = joined(given.join, given.seeds, sizes) if given.join else []
    for scoring in ROUTERS:
        for shared in (1, 0):
            for seed in given.seeds:
                variant = Variant(scoring, shared, seed)
                trainer = trained(variant, given, sizes, settings)
                routed = install(trainer.model, scoring, sizes.context)
                trainer.dev = trainer.dev[: given.dev_batches]
                routed.decode_batch = min(32, trainer.dev[0][0].shape[0])
                models.append(measured(variant, trainer, routed))
                del trainer
    cells = cells_of(models)
    path = file_of(given.output, "renormalise-tiny" if given.tiny else "renormalise", made)
    tested = [cell.to_json() for cell in cells]
    print(write(path, made, "measured", {"models": models, "tests": tested}))
    show(models, cells)


def joined(path: Path, seeds: Sequence[int], sizes: ModelSettings) -> list[dict[str, Any]]:
    """The models of another run of this program; refused where they are not beside this one's."""
    models: list[dict[str, Any]] = read_json(path, "results")["models"]
    if both := {model["seed"] for model in models} & set(seeds):
        raise LeanMoeError(f"{path} holds seed {min(both)} already: name the others by --seeds")
    if set(models[0]["loss"]) != set(rules_of(sizes)):
        raise LeanMoeError(f"{path} has the rules {', '.join(models[0]['loss'])}: another size's")
    return models


def tiny(data: Path) -> DeepseekV3Settings:
    """Sizes that a CPU trains in seconds."""
    vocabulary = json.loads((data / "prepared.json").read_text())["settings"]["vocab_size"]
    return DeepseekV3Settings(
        vocab_size=vocabulary, hidden=64, layers=3, dense_intermediate=128, experts=16,
        expert_intermediate=32, heads=2, kv_rank=32, qk_nope=16, qk_rope=16, v_head=32, context=64,
    )  # fmt: skip


if __name__ == "__main__":
    main()
