"""What do fewer experts in total cost, by each criterion, beside fewer experts a token?

    python benchmarks/pruning.py --text documents.txt

Experts are ranked on one half of the documents; next-token loss is measured on the other half,
under a plan that uses the experts that remain alone, paired by document with the full model.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from leanmoe import apply, provenance
from leanmoe.job.inputs import quiet
from leanmoe.job.prune import observe, output_errors
from leanmoe.plan import Plan, Rule
from leanmoe.prune.choose import as_plan, best_experts, kept_count
from leanmoe.prune.criteria import CRITERIA, place_scores
from leanmoe.quality.divergence import losses
from leanmoe.quality.paired import Estimate, loss_difference, loss_increase
from leanmoe.quality.windows import cut
from leanmoe.runtime import load_model, shape_of
from leanmoe.storage import write_json
from leanmoe.text import read_corpus, split

KEEP = ("87.5%", "75%", "50%", "25%")
SLOTS = (7, 6, 5, 4, 3)
RIVALS = ("random", "activate-count")


def shown(estimate: Estimate) -> str:
    """A loss increase in percent with its interval."""
    return f"{100 * estimate.ratio:+.2f}% [{100 * estimate.low:+.2f}, {100 * estimate.high:+.2f}]"


def main() -> None:
    """Measures, writes JSON, prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", default="reference")
    parser.add_argument("--text")
    parser.add_argument("--calibration-tokens", type=int, default=32768)
    parser.add_argument("--heldout-tokens", type=int, default=16384)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    quiet()
    where = provenance.collect("python " + " ".join(sys.argv), seed=0)
    corpus = read_corpus(arguments.text)
    calibration, heldout = split(corpus.documents, 0.5, 0)
    model, tokenizer = load_model(arguments.model)
    shape = shape_of(model)
    seen_windows = cut(calibration, tokenizer, tokens=arguments.calibration_tokens)
    windows = cut(heldout, tokenizer, tokens=arguments.heldout_tokens)
    seen = observe(model, seen_windows)
    counts = {keep: kept_count(keep, shape) for keep in KEEP}
    scores = {
        name: place_scores(each, len(shape.moe_layers), shape.experts, 0)
        if each.by_place is not None
        else each.by_statistics(seen)
        if each.by_statistics is not None
        else output_errors(model, seen_windows, min(counts.values()))
        for name, each in CRITERIA.items()
    }

    def under(plan: Plan, what: str) -> Any:
        with apply(model, plan, experts="leanmoe"):
            return losses(model, windows, what=what)

    full = under(Plan(shape.fingerprint()), "Full model")
    rows: list[dict[str, Any]] = []
    found = {}
    for name, scores_LE in scores.items():
        for keep, count in counts.items():
            kept = best_experts(scores_LE, count, shape)
            found[name, keep] = under(as_plan(kept, shape), f"{name}, {keep}")
            estimate = loss_increase(full, found[name, keep])
            rows.append({"criterion": name, "keep": keep, "experts": count, "increase": estimate})
    for slots in SLOTS:
        plan = Plan.uniform(shape.fingerprint(), Rule(top_k=slots))
        estimate = loss_increase(full, under(plan, f"k={slots}"))
        rows.append({"criterion": f"k={slots}", "keep": "100%", "increase": estimate})
    against = [
        {
            "criterion": name,
            "rival": rival,
            "keep": keep,
            "difference": loss_difference(full, found[name, keep], found[rival, keep]),
        }
        for name in ("reap", "easy-ep", "output-sum", "output-error")
        for rival in RIVALS
        for keep in ("75%", "50%")
    ]
    write(arguments.output, where, corpus.source, windows, rows, against)
    for row in rows:
        print(f"{row['criterion']:16s} {row['keep']:>6s}  {shown(row['increase'])}")
    print("\nloss of the first less that of the second, in shares of the full model's")
    for row in against:
        names = f"{row['criterion']} - {row['rival']}"
        print(f"{names:32s} {row['keep']:>6s}  {shown(row['difference'])}")


def write(
    output: Path,
    where: provenance.Provenance,
    text: str,
    windows: Any,
    rows: list[dict[str, Any]],
    against: list[dict[str, Any]],
) -> None:
    """The results file."""
    result = {
        "label": "measured",
        "provenance": where.to_json(),
        "text": text,
        "heldout": {"documents": windows.documents, "tokens": windows.tokens},
        "rows": [{**row, "increase": row["increase"].to_json()} for row in rows],
        "against": [{**row, "difference": row["difference"].to_json()} for row in against],
    }
    write_json(output / f"{where.date[:10]}-{where.commit}-pruning.json", result)


if __name__ == "__main__":
    main()
