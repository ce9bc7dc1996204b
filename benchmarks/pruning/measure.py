"""What do fewer experts in total cost and gain, by each criterion, beside fewer experts a token?

    python -m benchmarks.pruning.measure --text documents.txt --svg docs/assets/pruning.svg

Experts are ranked on one half of the documents; next-token loss is measured on the other half,
under a plan that uses the experts that remain alone, paired by document with the full model. Speed
and memory are those of the pruned checkpoints themselves; see pruning.speed.

Every finished piece is kept in --work, and the same command goes on from there. Timing alone wants
a quiet machine: run with --minutes 0 first, which does all the rest, then with the minutes that
the machine is quiet for.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.results import collect, file_of, parser_of, write
from benchmarks.pruning.compare import against, ordering
from benchmarks.pruning.memory import peak_of
from benchmarks.pruning.picture import picture
from benchmarks.pruning.speed import (
    FEWEST_ROUNDS,
    LOADS,
    Pair,
    Timed,
    Variant,
    read_prompts,
    steps_of,
    time_rounds,
    weight_bytes,
)
from benchmarks.pruning.table import one_table, show
from leanmoe import apply
from leanmoe.core.files import write_json, write_text
from leanmoe.core.progress import bar
from leanmoe.core.quiet import quiet_transformers
from leanmoe.core.run_folder import RunFolder
from leanmoe.core.text import read_corpus, split
from leanmoe.models.hf_config import FILE
from leanmoe.models.shape import MoEShape
from leanmoe.plan import Plan, Rule
from leanmoe.prune.checkpoint import read_source, write_pruned
from leanmoe.prune.criteria import (
    CRITERIA,
    Kept,
    Scores,
    as_plan,
    best_experts,
    kept_count,
    observe,
    rank_experts,
)
from leanmoe.prune.run import checkpoint_folder
from leanmoe.runtime import load_model, shape_of
from leanmoe.scoring.divergence import losses
from leanmoe.scoring.windows import Windows, cut
from leanmoe.stats.losses import Losses
from leanmoe.stats.paired import loss_increase

KEEP = ("87.5%", "75%", "50%", "25%")
SLOTS = (7, 6, 5, 4, 3)
FULL = ("full", "100%")


@dataclass(frozen=True)
class Asked:
    """What every stored piece depends on."""

    model: str
    text: str | None
    calibration_tokens: int
    heldout_tokens: int
    criteria: tuple[str, ...]


def main() -> None:
    """Measures what is not yet stored, writes JSON and a picture, prints tables."""
    arguments = _arguments()
    quiet_transformers()
    made = collect(seed=0)
    asked = Asked(
        arguments.model,
        arguments.text,
        arguments.calibration_tokens,
        arguments.heldout_tokens,
        tuple(arguments.criteria.split(",")),
    )
    folder = RunFolder.open(arguments.work, asked, arguments.overwrite, "pruning")
    corpus = read_corpus(asked.text)
    calibration, heldout = split(corpus.documents, 0.5, 0)
    model, tokenizer = load_model(asked.model)
    shape = shape_of(model)
    ranked_on = cut(calibration, tokenizer, tokens=asked.calibration_tokens)
    windows = cut(heldout, tokenizer, tokens=asked.heldout_tokens)
    kept = experts_kept(model, ranked_on, shape, asked, folder)
    plans = {pair: as_plan(chosen, shape) for pair, chosen in kept.items()}
    plans |= {(name, "100%"): plan for name, plan in skipping(shape).items()}
    full, lost = measure(model, windows, plans, shape, folder)
    prompts = read_prompts(heldout, tokenizer, max(LOADS))
    peaks = measure_peaks(asked.model, kept, plans, prompts, folder)
    timed = time_all(model, kept, plans, prompts, folder, arguments)
    result = {
        "text": corpus.source,
        "heldout": {"documents": windows.documents, "tokens": windows.tokens},
        "rows": rows_of(full, lost, kept, timed, peaks),
        "against": against(full, lost),
        "ordering": [] if timed is None else ordering(full, lost, timed, KEEP),
    }
    every = set(asked.criteria) == set(CRITERIA)
    path = file_of(arguments.output, f"pruning{'' if every else '-some'}", made)
    print(write(path, made, "measured", result))
    if arguments.svg and timed is not None:
        write_text(arguments.svg, picture(result))
    print(one_table(result))
    show(result)


def _arguments() -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--model", default="reference")
    parser.add_argument("--text")
    parser.add_argument("--calibration-tokens", type=int, default=32768)
    parser.add_argument("--heldout-tokens", type=int, default=16384)
    parser.add_argument("--minutes", type=float, default=15, help="to time at most, this time")
    parser.add_argument("--rounds", type=int, default=24, help="of timing, in all")
    parser.add_argument("--criteria", default=",".join(CRITERIA), help="to time and to measure")
    parser.add_argument("--svg", type=Path)
    parser.add_argument("--work", type=Path, default=Path("runs/pruning"))
    parser.add_argument("--overwrite", action="store_true", help="what --work holds")
    return parser.parse_args()


def experts_kept(
    model: Any, ranked_on: Windows, shape: MoEShape, asked: Asked, folder: RunFolder
) -> dict[Pair, Kept]:
    """The experts that remain by criterion and share."""

    def compute() -> Any:
        scores = rank(model, ranked_on, shape, asked.criteria)
        return [
            [name, keep, best_experts(scores_LE, kept_count(keep, shape), shape)]
            for name, scores_LE in scores.items()
            for keep in KEEP
        ]

    stored = folder.step("kept", compute)
    return {
        (name, keep): tuple(tuple(map(int, experts)) for experts in layers)
        for name, keep, layers in stored
    }


def rank(model: Any, windows: Windows, shape: MoEShape, names: Sequence[str]) -> dict[str, Scores]:
    """Scores by each criterion."""
    seen = observe(model, windows)
    least = min(kept_count(keep, shape) for keep in KEEP)
    return {
        name: rank_experts(CRITERIA[name], shape, 0, model, windows, least, seen) for name in names
    }


def skipping(shape: MoEShape) -> dict[str, Plan]:
    """All experts, fewer a token, their weights normalised anew or kept."""
    found = {}
    for slots in SLOTS:
        for keep, words in ((None, ""), (True, ", weights kept")):
            rule = Rule(top_k=slots, renormalise=0.0 if keep else 1.0)
            found[f"k={slots}{words}"] = Plan.uniform(shape.fingerprint(), rule)
    return found


def measure(
    model: Any, windows: Windows, plans: dict[Pair, Plan], shape: MoEShape, folder: RunFolder
) -> tuple[Losses, dict[Pair, Losses]]:
    """Held-out losses of the full model and under every plan."""

    def under(plan: Plan, pair: Pair) -> Losses:
        def compute() -> Any:
            with apply(model, plan, experts="leanmoe"):
                return losses(model, windows, what=", ".join(pair)).to_json()

        return Losses.from_json(folder.step(f"loss-{file_name(pair)}", compute))

    full = under(Plan(shape.fingerprint()), FULL)
    return full, {pair: under(plan, pair) for pair, plan in plans.items()}


def file_name(pair: Pair) -> str:
    """Of what is stored for a setting."""
    return "-".join(pair).replace(", ", "-").replace(" ", "-").replace("%", "")


def checkpoint_of(source: str, pair: Pair, kept: dict[Pair, Kept], folder: RunFolder) -> Path:
    """The folder of a setting's weights: a pruned checkpoint, written once, or the model itself."""
    if pair not in kept:
        return checkpoint_folder(source)
    target = folder.path / "checkpoints" / file_name(pair)
    if not (target / FILE).is_file():
        write_pruned(read_source(checkpoint_folder(source)), kept[pair], target, {}, lambda _: None)
    return target


def measure_peaks(
    source: str,
    kept: dict[Pair, Kept],
    plans: dict[Pair, Plan],
    prompts: list[list[int]],
    folder: RunFolder,
) -> dict[Pair, dict[str, int]]:
    """Peak memory of a process that loads and runs each setting."""
    inputs = folder.path / "memory"
    write_json(inputs / "prompts.json", prompts)

    def peak(pair: Pair) -> Any:
        plan_file = None
        if pair in plans and pair not in kept:
            plan_file = inputs / f"{file_name(pair)}.json"
            write_json(plan_file, plans[pair].to_json())
        weights = checkpoint_of(source, pair, kept, folder)
        return peak_of(weights, plan_file, inputs / "prompts.json")

    found = {}
    with bar("Measuring memory", 1 + len(plans), "processes") as advance:
        for pair in (FULL, *plans):
            found[pair] = folder.step(f"memory-{file_name(pair)}", partial(peak, pair))
            advance(1)
    return found


def time_all(
    model: Any,
    kept: dict[Pair, Kept],
    plans: dict[Pair, Plan],
    prompts: list[list[int]],
    folder: RunFolder,
    arguments: argparse.Namespace,
) -> Timed | None:
    """Speed and weights of the full model, of every pruned checkpoint and of skipping.

    None while there are too few rounds for an interval.
    """
    empty = Plan(shape_of(model).fingerprint())
    variants = [Variant(FULL, model, empty)]
    for pair, plan in plans.items():
        if pair in kept:
            pruned, _ = load_model(str(checkpoint_of(arguments.model, pair, kept, folder)))
            variants.append(Variant(pair, pruned, Plan(shape_of(pruned).fingerprint())))
        else:
            variants.append(Variant(pair, model, plan))
    steps = cache(lambda: steps_of(variants[0], torch.tensor(prompts)))
    rounds = time_rounds(variants, steps, folder, arguments.rounds, arguments.minutes)
    if len(rounds) < FEWEST_ROUNDS:
        print(f"{len(rounds)} rounds are timed, {FEWEST_ROUNDS} needed for an interval")
        return None
    sizes = {variant.name: weight_bytes(variant.model) for variant in variants}
    return Timed.of(rounds, sizes)


def rows_of(
    full: Losses,
    lost: dict[Pair, Losses],
    kept: dict[Pair, Kept],
    timed: Timed | None,
    peaks: dict[Pair, dict[str, int]],
) -> list[dict[str, Any]]:
    """What every setting loses, gains and needs."""
    rows = [{"criterion": FULL[0], "keep": FULL[1], **peaks[FULL]}]
    if timed is not None:
        rows[0] |= timed.row(FULL)
    for pair, found in lost.items():
        row: dict[str, Any] = {"criterion": pair[0], "keep": pair[1]}
        if pair in kept:
            row["experts"] = [len(experts) for experts in kept[pair]]
        row |= {"increase": loss_increase(full, found).to_json(), **peaks[pair]}
        if timed is not None and pair in timed.seconds:
            row |= timed.row(pair)
        rows.append(row)
    return rows


if __name__ == "__main__":
    main()
