"""A stand-in of SGLang's engine: tokens that depend on its plan, and its scheduler's methods.

Its tokens are the same twice. A plan of `top_k` and an override of the config give the same.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any


class Engine:
    def __init__(self, **settings: Any) -> None:
        self._steps: list[tuple[int, float]] = []
        path = os.environ.get("LEANMOE_PLAN")
        self._rule = {}
        if path:
            plan = json.loads(Path(path).read_text())
            print(f"leanmoe: plan {path} at work in 4 MoE layers", flush=True)
            self._rule = plan["levels"][0]["bands"][0]["rules"][0]
        if "json_model_override_args" in settings:
            override = json.loads(settings["json_model_override_args"])
            self._rule = {"top_k": override["num_experts_per_tok"]}

    def generate(
        self, input_ids: list[list[int]], sampling_params: dict[str, Any]
    ) -> list[dict[str, Any]]:
        start = len(json.dumps(self._rule, sort_keys=True))
        count = sampling_params["max_new_tokens"]
        now = time.perf_counter()
        self._steps += [(len(input_ids), now + 0.01 * n) for n in range(count - 1)]
        return [{"output_ids": [start + sum(ids) + n for n in range(count)]} for ids in input_ids]

    def collective_rpc(self, method: str, answer: str, **_arguments: Any) -> None:
        found: Any = None
        if method == "leanmoe_steps":
            found, self._steps = self._steps, []
        elif method == "leanmoe_counts":
            found = [[requests, requests] for requests, _ in self._steps]
        elif method == "leanmoe_step_ms":
            found = 9.0
        elif method == "leanmoe_chosen":
            found = {"distinct": 40.0, "activated": 4.0}
        elif method == "leanmoe_padding":
            found = {"counts": True, "padding_slots": 0, "rows_routed_otherwise": 0}
        else:
            assert method in ("leanmoe_select", "leanmoe_draw"), method
        Path(answer).write_text(json.dumps({"answer": found}))

    def shutdown(self) -> None:
        pass
