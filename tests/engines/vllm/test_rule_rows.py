"""Rules for prompt tokens in vLLM: which rows are a prompt's in every step of random schedules.

Letters: T tokens (rows of a step).
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from leanmoe.models.shape import read_shape
from leanmoe.plan import Band, Plan, Rule

MODEL = read_shape("reference").fingerprint()
LAYERS = MODEL.moe_layers
PLAN = Plan.banded(
    MODEL,
    (Band(2, (Rule(top_k=6),) * LAYERS), Band(8, (Rule(top_k=5),) * LAYERS)),
    prompt=(Rule(top_k=4), Rule(top_k=0)) * (LAYERS // 2),
)
VOCABULARY = 400
"""Token ids below it are words of the reference model's."""


@dataclass
class Oracle:
    """What the test itself knows of its requests, held against each step that the model runs."""

    runner: Any
    prompts: dict[str, int] = field(default_factory=dict)
    """The length of each request's prompt."""
    reading: set[str] = field(default_factory=set)
    """The requests that ask for prompt logprobs."""
    seen: Counter[str] = field(default_factory=Counter)
    _next: dict[str, int] = field(default_factory=dict)

    def expect(self, positions: list[int]) -> list[int]:
        """The rule row of each of a step's rows, from its request and position alone."""
        starts = self.runner.query_start_loc.np
        rows = [0] * len(positions)
        for number, full in enumerate(self.runner.input_batch.req_ids):
            name = full.partition("-")[0]  # vLLM adds to the names that it is given
            last = self.prompts[name] - 1
            mine = positions[starts[number] : starts[number + 1]]
            self._note(name, mine, last)
            for row, position in enumerate(mine, start=int(starts[number])):
                rows[row] = 2 if position < last and name not in self.reading else 1
        return rows

    def _note(self, name: str, positions: list[int], last: int) -> None:
        assert positions == list(range(positions[0], positions[0] + len(positions)))
        before = self._next.get(name)
        self.seen["prefix hits"] += before is None and positions[0] > 0
        self.seen["preemptions"] += before is not None and positions[0] < before
        self.seen["recomputed replies"] += len(positions) > 1 and positions[-1] > last
        self.seen["chunks"] += 0 < positions[0] < last
        self.seen["read prompts"] += name in self.reading and positions[0] < last
        self._next[name] = positions[-1] + 1


def test_every_row_of_random_schedules_is_under_its_own_rule(load: Callable[..., Any]) -> None:
    from vllm import SamplingParams

    from leanmoe.serve.vllm.patch import process_plugin

    llm = load(
        PLAN, max_num_batched_tokens=40, max_num_seqs=6, block_size=32, num_gpu_blocks_override=11,
        enable_prefix_caching=True, enable_chunked_prefill=True, max_model_len=192,
    )  # fmt: skip
    engine, model = llm.llm_engine, process_plugin().model
    assert model is not None
    assert model.rule_rows is not None
    rule_rows = model.rule_rows
    runner = engine.model_executor.driver_worker.worker.model_runner
    oracle = Oracle(runner)

    def compare(_module: Any, arguments: Any, keywords: dict[str, Any]) -> None:
        positions = keywords["positions"] if "positions" in keywords else arguments[1]
        if not runner.input_batch.req_ids:
            return
        wanted = oracle.expect(positions.tolist())
        assert rule_rows.rows(len(wanted)).tolist() == wanted
        replies = wanted.count(1)
        oracle.seen[f"band {int(rule_rows.band_1)}"] += 1
        assert int(rule_rows.band_1) == (replies > 2) + (replies > 8)

    hook = runner.model.register_forward_pre_hook(compare, with_kwargs=True)
    drawn = random.Random(0)
    shared = [drawn.randrange(VOCABULARY) for _ in range(64)]
    for number in range(60):
        own = [drawn.randrange(VOCABULARY) for _ in range(drawn.randint(1, 70))]
        prompt = shared[: 32 * drawn.randrange(3)] + own
        name, is_read = f"r{number}", drawn.random() < 0.2
        oracle.prompts[name] = len(prompt)
        oracle.reading |= {name} if is_read else set()
        engine.add_request(
            name, {"prompt_token_ids": prompt},
            SamplingParams(temperature=0, max_tokens=drawn.randint(1, 24), ignore_eos=True,
                           prompt_logprobs=0 if is_read else None),
        )  # fmt: skip
        for _ in range(drawn.randrange(8)):
            engine.step()
        if drawn.random() < 0.15:
            engine.abort_request([f"r{drawn.randrange(number + 1)}"])
            oracle.seen["aborts"] += 1
    while engine.has_unfinished_requests():
        engine.step()
    hook.remove()
    needed = "prefix hits,preemptions,recomputed replies,chunks,read prompts,aborts"
    assert all(oracle.seen[case] > 2 for case in needed.split(",")), oracle.seen
    assert all(oracle.seen[f"band {band}"] > 2 for band in range(3)), oracle.seen
    with torch.inference_mode():
        runner._dummy_run(8)
    assert rule_rows.rows(40).tolist() == [0] * 40
