"""How much faster is a plan at a given load? Full model and plan take turns in the same run.

python examples/measure_a_load.py
"""

from pathlib import Path
from tempfile import TemporaryDirectory

from leanmoe import Plan, Rule
from leanmoe.bench.one_block import block
from leanmoe.bench.run import Job, run_job
from leanmoe.bench.settings import BenchSettings, Lengths
from leanmoe.models.shape import read_shape

settings = BenchSettings(
    text=str(Path(__file__).parents[1] / "docs"),  # prompts are cut from these files
    concurrency=(4,),
    input_len=Lengths(32, 96),  # any length between, each as likely
    output_len=Lengths(8, 8),
    repeats=3,
    num_prompts=8,
    goodput=(("ttft", 500.0), ("tpot", 50.0)),  # milliseconds
)

with TemporaryDirectory() as name:
    # Each token keeps its best three experts, and takes the rest from those others have woken.
    rule = Rule(top_k=8, guaranteed=3, keep_weights=True)
    plan = Path(name) / "shared.json"
    Plan.uniform(read_shape("reference").fingerprint(), rule).save(plan)
    job = Job(("reference",), (plan,), settings, Path(name) / "bench", "examples")
    run_job(job, lambda record, load: print(block(record.entry(load))), closed=lambda _: None)
