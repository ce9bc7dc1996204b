"""vLLM with worker processes of its own, under LEANMOE_PLAN; `test_ranks.py` starts it.

    python workers.py FOLDER

FOLDER/found.json gets the tokens and what each worker says of the last step.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(folder: Path) -> None:
    """Runs it."""
    from vllm import LLM, SamplingParams

    from leanmoe.models.reference import path

    llm = LLM(
        model=str(path()), dtype="float32", enforce_eager=True, max_model_len=256, seed=0,
        max_num_seqs=16, enable_prefix_caching=False, gpu_memory_utilization=0.3,
        compilation_config={"custom_ops": ["none"]}, tensor_parallel_size=2,
        worker_extension_cls="leanmoe.serve.vllm.plan_metrics.PlanWorker",
    )  # fmt: skip
    prompts = json.loads((folder / "prompts.json").read_text())
    replies = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        SamplingParams(temperature=0, max_tokens=16, ignore_eos=True),
        use_tqdm=False,
    )
    found = {
        "tokens": [list(reply.outputs[0].token_ids) for reply in replies],
        "workers": llm.collective_rpc("leanmoe_statistics"),
    }
    (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
