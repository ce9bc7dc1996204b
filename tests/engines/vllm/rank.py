"""One process of several that run the reference model in vLLM together; `test_ranks.py` starts it.

    python rank.py FOLDER

FOLDER/settings.json says what to run; FOLDER/RANK.json gets the tokens and every step's experts,
and where "then_stock" is set the tokens of the same engine with the plan taken out.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from torch import Tensor


def main(folder: Path) -> None:
    """Runs it and ends at once: an orderly end waits for processes that are gone."""
    settings: dict[str, Any] = json.loads((folder / "settings.json").read_text())
    rank = int(os.environ["RANK"])
    steps: list[Any] = []

    from leanmoe.models.reference import path
    from leanmoe.plan import Plan
    from leanmoe.serve.plugin_options import PluginOptions
    from leanmoe.serve.routing_statistics import RoutingStatistics
    from leanmoe.serve.vllm.patch import process_plugin

    def note(_self: Any, layer: int, ids_TK: Tensor, weights_TK: Tensor, *_: Any) -> None:
        used = (weights_TK != 0).tolist()
        steps.append((layer, ids_TK.tolist(), used))

    if settings["plan"]:
        RoutingStatistics.note = note  # type: ignore[method-assign, assignment]
        options = PluginOptions(collect_stats=True, cross_rank=settings["cross_rank"])
        process_plugin().start(Plan.load(folder / "plan.json"), options)
    from vllm import LLM, SamplingParams

    usual = {"enforce_eager": True, "compilation_config": {"custom_ops": ["none"]}}
    llm = LLM(
        model=str(path()), dtype="float32", max_model_len=256, seed=0, max_num_seqs=16,
        enable_prefix_caching=False, gpu_memory_utilization=0.3,
        distributed_executor_backend="external_launcher", **usual | settings["layout"],
    )  # fmt: skip
    steps.clear()  # vLLM's own trials of the model
    mine = settings["requests"][rank]

    def replies() -> list[list[int]]:
        found = llm.generate(
            [{"prompt_token_ids": prompt} for prompt, _ in mine],
            [SamplingParams(temperature=0, max_tokens=count, ignore_eos=True) for _, count in mine],
            use_tqdm=False,
        )
        return [list(reply.outputs[0].token_ids) for reply in found]

    found = {"tokens": replies(), "steps": list(steps)}
    if settings["then_stock"]:
        model = process_plugin().model
        assert model is not None
        for layer in model.layers:  # a router's own method shows again
            del model.runners[layer].router._compute_routing
        found["stock"] = replies()
        assert len(steps) == len(found["steps"]), "the plan is at work still"
    (folder / f"{rank}.json").write_text(json.dumps(found))
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
