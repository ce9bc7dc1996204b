"""What do fewer experts in total cost and gain, by each criterion, beside fewer experts a token?

    python benchmarks/pruning.py --text documents.txt --svg docs/pruning.svg

Experts are ranked on one half of the documents; next-token loss is measured on the other half,
under a plan that uses the experts that remain alone, paired by document with the full model. Speed
and memory are those of the pruned checkpoints themselves; see pruning_speed.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pruning_speed import PROMPT, Timed, Variant, loaded, read_prompts, speeds
from pruning_svg import picture

from leanmoe import apply, provenance
from leanmoe.job.inputs import quiet
from leanmoe.job.prune import ALLOCATION_TOKENS, allocate, first_windows, observe, output_errors
from leanmoe.plan import Plan, Rule
from leanmoe.prune.choose import Kept, as_plan, best_experts, kept_count
from leanmoe.prune.criteria import CRITERIA, Scores, criterion, place_scores
from leanmoe.quality.divergence import losses
from leanmoe.quality.documents import Losses
from leanmoe.quality.paired import Estimate, loss_difference, loss_increase
from leanmoe.quality.windows import Windows, cut
from leanmoe.runtime import load_model, shape_of
from leanmoe.shape import MoEShape
from leanmoe.storage import write_json, write_text
from leanmoe.text import read_corpus, split

KEEP = ("87.5%", "75%", "50%", "25%")
SLOTS = (7, 6, 5, 4, 3)
RIVALS = ("random", "activate-count")
BY_OUTPUT = ("reap", "easy-ep", "output-sum", "output-error")
UNEVEN = ("75%", "50%")
UNEVEN_CRITERION = "easy-ep"
LOADS = (1, 8, 32)
STEPS = (PROMPT, *map(str, LOADS))
AS_FAST = 0.97


def main() -> None:
    """Measures, writes JSON and a picture, prints tables."""
    arguments = _arguments()
    quiet()
    where = provenance.collect("python " + " ".join(sys.argv), seed=0)
    corpus = read_corpus(arguments.text)
    calibration, heldout = split(corpus.documents, 0.5, 0)
    model, tokenizer = load_model(arguments.model)
    shape = shape_of(model)
    ranked_on = cut(calibration, tokenizer, tokens=arguments.calibration_tokens)
    windows = cut(heldout, tokenizer, tokens=arguments.heldout_tokens)
    scores = rank(model, ranked_on, shape, arguments.criteria.split(","))
    kept = {
        (name, keep): best_experts(scores_LE, kept_count(keep, shape), shape)
        for name, scores_LE in scores.items()
        for keep in KEEP
    }
    uneven = {}
    for keep in UNEVEN if arguments.uneven and UNEVEN_CRITERION in scores else ():
        found = allocate(
            model,
            scores[UNEVEN_CRITERION],
            first_windows(ranked_on, ALLOCATION_TOKENS),
            shape,
            kept_count(keep, shape),
        )
        uneven[keep] = found
        kept[f"{UNEVEN_CRITERION}, uneven", keep] = best_experts(
            scores[UNEVEN_CRITERION], found.counts, shape
        )
    plans = {pair: as_plan(chosen, shape) for pair, chosen in kept.items()}
    plans |= {(name, "100%"): plan for name, plan in skipping(shape).items()}
    full, lost = measure(model, windows, plans, shape)
    timed = None
    if arguments.rounds:
        ids_NL = read_prompts(heldout, tokenizer, max(LOADS))
        timed = time_all(model, kept, plans, ids_NL, arguments)
    result = {
        "label": "measured",
        "provenance": where.to_json(),
        "text": corpus.source,
        "heldout": {"documents": windows.documents, "tokens": windows.tokens},
        "rows": rows_of(full, lost, kept, timed),
        "against": against(full, lost),
        "uneven": {keep: asdict(found) for keep, found in uneven.items()},
        "ordering": [] if timed is None else ordering(full, lost, timed),
    }
    every = len(scores) == len(CRITERIA)
    name = f"{where.date[:10]}-{where.commit}-pruning{'' if every else '-some'}.json"
    write_json(arguments.output / name, result)
    if arguments.svg and timed is not None:
        write_text(arguments.svg, picture(result))
    show(result)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", default="reference")
    parser.add_argument("--text")
    parser.add_argument("--calibration-tokens", type=int, default=32768)
    parser.add_argument("--heldout-tokens", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=24, help="of each timing; 0 times nothing")
    parser.add_argument("--criteria", default=",".join(CRITERIA), help="to time and to measure")
    parser.add_argument("--uneven", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--svg", type=Path)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    return parser.parse_args()


def rank(model: Any, windows: Windows, shape: MoEShape, names: Sequence[str]) -> dict[str, Scores]:
    """Scores by each criterion."""
    seen = observe(model, windows)
    least = min(kept_count(keep, shape) for keep in KEEP)
    return {
        name: place_scores(each, len(shape.moe_layers), shape.experts, 0)
        if each.by_place is not None
        else each.by_statistics(seen)
        if each.by_statistics is not None
        else output_errors(model, windows, least)
        for name, each in ((name, criterion(name)) for name in names)
    }


def skipping(shape: MoEShape) -> dict[str, Plan]:
    """All experts, fewer a token, their weights normalised anew or kept."""
    found = {}
    for slots in SLOTS:
        for keep, words in ((None, ""), (True, ", weights kept")):
            rule = Rule(top_k=slots, keep_weights=keep)
            found[f"k={slots}{words}"] = Plan.uniform(shape.fingerprint(), rule)
    return found


def measure(
    model: Any, windows: Windows, plans: dict[tuple[str, str], Plan], shape: MoEShape
) -> tuple[Losses, dict[tuple[str, str], Losses]]:
    """Held-out losses of the full model and under every plan."""

    def under(plan: Plan, what: str) -> Losses:
        with apply(model, plan, experts="leanmoe"):
            return losses(model, windows, what=what)

    full = under(Plan(shape.fingerprint()), "Full model")
    return full, {pair: under(plan, ", ".join(pair)) for pair, plan in plans.items()}


def time_all(
    model: Any,
    kept: dict[tuple[str, str], Kept],
    plans: dict[tuple[str, str], Plan],
    ids_NL: Any,
    arguments: argparse.Namespace,
) -> Timed:
    """Speed and memory of the full model, of every pruned checkpoint and of skipping."""
    with loaded(arguments.model, {p: k for p, k in kept.items() if "uneven" not in p[0]}) as found:
        variants = [Variant(("full", "100%"), model, Plan(shape_of(model).fingerprint()))]
        for pair, pruned in found.items():
            variants.append(Variant(pair, pruned, Plan(shape_of(pruned).fingerprint())))
        for pair, plan in plans.items():
            if pair[1] == "100%":
                variants.append(Variant(pair, model, plan))
        return speeds(variants, ids_NL, LOADS, arguments.rounds)


def rows_of(
    full: Losses,
    lost: dict[tuple[str, str], Losses],
    kept: dict[tuple[str, str], Kept],
    timed: Timed | None,
) -> list[dict[str, Any]]:
    """What every setting loses, gains and needs."""
    rows = []
    if timed is not None:
        rows.append({"criterion": "full", "keep": "100%", **timed.row(("full", "100%"))})
    for pair, found in lost.items():
        row: dict[str, Any] = {"criterion": pair[0], "keep": pair[1]}
        if pair in kept:
            row["experts"] = [len(experts) for experts in kept[pair]]
        row["increase"] = loss_increase(full, found).to_json()
        if timed is not None and pair in timed.seconds:
            row |= timed.row(pair)
        rows.append(row)
    return rows


def against(full: Losses, lost: dict[tuple[str, str], Losses]) -> list[dict[str, Any]]:
    """The criteria that look at outputs against those that do not; uneven against even."""
    pairs = [
        (name, rival, keep) for name in BY_OUTPUT for rival in RIVALS for keep in ("75%", "50%")
    ]
    pairs += [(f"{UNEVEN_CRITERION}, uneven", UNEVEN_CRITERION, keep) for keep in UNEVEN]
    return [
        {
            "criterion": name,
            "rival": rival,
            "keep": keep,
            "difference": loss_difference(full, lost[name, keep], lost[rival, keep]).to_json(),
        }
        for name, rival, keep in pairs
        if (name, keep) in lost and (rival, keep) in lost
    ]


def ordering(
    full: Losses, lost: dict[tuple[str, str], Losses], timed: Timed
) -> list[dict[str, Any]]:
    """At each load: does skipping lose less than pruning does, where it is as fast or faster?

    Beside each pruned checkpoint (of the criterion that loses least there, which favours pruning)
    stands the skipping of least loss that is surely no more than 3% slower, with weights normalised
    anew as in the paper, and kept as in leanmoe.
    """
    rows = []
    for load in STEPS:
        for keep in KEEP:
            pruned = min(
                (pair for pair in timed.seconds if pair[1] == keep),
                key=lambda pair: lost[pair].mean,
            )
            for way, marked in (("normalised anew", False), ("weights kept", True)):
                row: dict[str, Any] = {
                    "load": load,
                    "keep": keep,
                    "criterion": pruned[0],
                    "skipping": way,
                }
                fast = [
                    pair
                    for pair in lost
                    if pair[1] == "100%"
                    and ("kept" in pair[0]) == marked
                    and timed.ratio(pruned, pair, load).low >= AS_FAST
                ]
                if not fast:
                    rows.append({**row, "verdict": "no skipping is surely as fast"})
                    continue
                best = min(fast, key=lambda pair: lost[pair].mean)
                found = loss_difference(full, lost[best], lost[pruned])
                rows.append(
                    {
                        **row,
                        "setting": best[0],
                        "speed": asdict(timed.ratio(pruned, best, load)),
                        "difference": found.to_json(),
                        "verdict": _verdict(found),
                    }
                )
    return rows


def _verdict(found: Estimate) -> str:
    if found.high < 0:
        return "skipping loses less"
    return "pruning loses less" if found.low > 0 else "undecided"


def shown(estimate: dict[str, float], key: str = "ratio") -> str:
    """A share in percent with its interval."""
    value, low, high = (100 * estimate[name] for name in (key, "low", "high"))
    return f"{value:+.2f}% [{low:+.2f}, {high:+.2f}]"


def show(result: dict[str, Any]) -> None:
    """The tables."""
    for row in result["rows"]:
        line = f"{row['criterion']:20s} {row['keep']:>6s}"
        line += f"  {shown(row['increase'])}" if "increase" in row else ""
        for load, speed in row.get("speed", {}).items():
            line += f"  {load}: x{speed['median']:.3f} [{speed['low']:.3f}, {speed['high']:.3f}]"
        line += f"  {row['bytes'] / 1e6:.1f} MB" if "bytes" in row else ""
        print(line)
    print("\nloss of the first less that of the second, in shares of the full model's")
    for row in result["against"]:
        names = f"{row['criterion']} - {row['rival']}"
        print(f"{names:32s} {row['keep']:>6s}  {shown(row['difference'])}")
    print("\nskipping against pruning at equal speed or better")
    for row in result["ordering"]:
        line = f"{row['load']:>7s} {row['keep']:>6s} {row['criterion']:14s} {row['skipping']:16s}"
        if "setting" in row:
            line += f" {row['setting']:18s} {shown(row['difference'])}"
        print(f"{line}  {row['verdict']}")
    counted: dict[str, int] = {}
    for row in result["ordering"]:
        counted[row["verdict"]] = counted.get(row["verdict"], 0) + 1
    print(counted)


if __name__ == "__main__":
    main()
