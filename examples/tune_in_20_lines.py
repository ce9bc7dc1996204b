"""Find a faster plan for a model, prove what it costs, and measure what it gains.

python examples/tune_in_20_lines.py

The load and the text are tiny, so that this ends within a minute: leave `tiny` out for a proof that
holds.
"""

from tempfile import TemporaryDirectory
from typing import Any

import leanmoe

tiny: dict[str, Any] = {"concurrency": 2, "input_len": 16, "output_len": 4, "repeats": 3}
tiny |= {"profile_tokens": 1024, "sensitivity_tokens": 64, "heldout_tokens": 4096}

with TemporaryDirectory() as folder:
    results = leanmoe.tune("reference", output=folder, margins="5%", **tiny)
    plan = leanmoe.Plan.load(f"{folder}/plan.json")

for verdict in results.verdicts:
    print(f"concurrency {verdict.concurrency}: {verdict.reason}")
    if verdict.loss and verdict.gain:
        print(f"  loss {100 * verdict.loss.ratio:+.2f}%, throughput x {verdict.gain.median:.2f}")
print(f"The plan has {len(plan.levels)} levels.")
