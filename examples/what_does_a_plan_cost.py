"""What does a plan cost? Next-token loss, paired by document, with an interval.

python examples/what_does_a_plan_cost.py
"""

import json
from pathlib import Path
from pydoc_data.topics import topics
from tempfile import TemporaryDirectory

import leanmoe

with TemporaryDirectory() as folder:
    # A document a line; here Python's own help, which every Python brings along.
    text = Path(folder) / "python.jsonl"
    text.write_text("\n".join(json.dumps({"text": topic}) for topic in topics.values()))
    results = leanmoe.evaluate(
        "reference",
        rule=["top_k=6,renormalise=0", "top_k=6"],
        tasks="none",
        domain=f"python={text}",
        output=f"{folder}/eval",
    )

assert results.domains is not None
for row in results.domains.rows:
    loss = row.loss["python"]
    bound = f"at most {100 * loss.upper_bound:+.2f}% ({results.confidence:.0%} confidence)"
    print(f"{row.plan}: loss {100 * loss.ratio:+.2f}%, {bound}")
