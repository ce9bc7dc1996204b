"""How much faster is a plan at a given load? Full model and plan take turns in the same run.

python examples/measure_a_load.py
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import leanmoe
from leanmoe import Plan, Rule

with TemporaryDirectory() as name:
    # Each token keeps its best three experts, and takes the rest from those that others keep.
    plan = Path(name) / "shared.json"
    Plan.uniform("reference", Rule(top_k=8, guaranteed=3, renormalise=0.0)).save(plan)
    results = leanmoe.bench(
        "reference",
        plan=plan,
        output=f"{name}/bench",
        text=str(Path(__file__).parents[1] / "docs"),  # prompts are cut from these files
        concurrency=4,
        input_len="32:96",  # any length between, each as likely
        output_len=8,
        num_prompts=8,
        repeats=3,
        goodput="ttft:500 tpot:50",  # milliseconds
    )

for load in results.loads:
    for variant in results.names:
        figures = load.median[variant]
        print(f"{load}, {variant}: {figures['output_throughput']:.0f} output tokens/s")
    gain = load.gain["shared"]["output_throughput"]
    print(f"{load}: throughput x {gain.median:.2f} [{gain.low:.2f}, {gain.high:.2f}]")
