"""What does a plan cost? Next-token loss, paired by passage, with an interval.

python examples/what_does_a_plan_cost.py
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import leanmoe

with TemporaryDirectory() as folder:
    results = leanmoe.evaluate(
        "reference",
        rule=["top_k=6,keep_weights", "top_k=6"],
        tasks=(),
        domain_tokens=24_000,
        domain=[("docs", str(Path(__file__).parents[1] / "docs"))],  # or your own text
        output=folder,
    )

assert results.domains is not None
for row in results.domains.rows:
    loss = row.loss["docs"]
    print(f"{row.plan}: loss {100 * loss.ratio:+.2f}%, at most {100 * loss.upper_bound:+.2f}%")
