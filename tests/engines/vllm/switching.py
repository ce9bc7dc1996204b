"""vLLM with worker processes of its own and two plans in turn; `test_ranks.py` runs it.

    python switching.py FOLDER RANKS

The plan is changed between two steps while requests run. FOLDER/RANKS.json gets the tokens and, for
each step, what the scheduler chose and what each worker heard.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

CHANGE_AT = 6
"""The step before which the plan is changed."""


class HeardWorker:
    """A method that vLLM adds to its workers."""

    def heard(self) -> list[int]:
        """The choice of the last step that this worker ran."""
        from leanmoe.serve.vllm.patch import process_plugin

        model = process_plugin().model
        assert model is not None
        assert model.rule_rows is not None
        return list(model.rule_rows._choice)


def main(folder: Path, ranks: int) -> None:
    """Runs it."""
    from vllm import LLM, SamplingParams

    from leanmoe.models.reference import path
    from leanmoe.serve.vllm.control_hooks import process_control

    llm = LLM(
        model=str(path()), dtype="float32", enforce_eager=True, max_model_len=256, seed=0,
        max_num_seqs=16, enable_prefix_caching=False, gpu_memory_utilization=0.3,
        compilation_config={"custom_ops": ["none"]}, tensor_parallel_size=ranks,
        worker_extension_cls="tests.engines.vllm.switching.HeardWorker",
    )  # fmt: skip
    control = process_control().engine
    assert control is not None
    tiers = (None, "fast", "strict")
    for number, prompt in enumerate(json.loads((folder / "prompts.json").read_text())):
        tier = tiers[number % len(tiers)]
        asked = None if tier is None else {"leanmoe_tier": tier}
        parameters = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, extra_args=asked)
        llm.llm_engine.add_request(str(number), {"prompt_token_ids": prompt}, parameters)
    tokens: dict[str, list[int]] = {}
    steps: list[Any] = []
    while llm.llm_engine.has_unfinished_requests():
        if len(steps) == CHANGE_AT:
            control.change_plan("b")
        done = llm.llm_engine.step()
        tokens |= {one.request_id: list(one.outputs[0].token_ids) for one in done if one.finished}
        steps.append([list(control._choice), *llm.collective_rpc("heard")])
    found = {"tokens": tokens, "steps": steps}
    (folder / f"{ranks}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
