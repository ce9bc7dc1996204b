"""Rules for prompt tokens in vLLM: which rows are a prompt's in every step of random schedules, and
that replies are those of Transformers under the same plan.

Letters: T tokens (rows of a step).
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from leanmoe.core.errors import LeanMoeError
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
        oracle.seen[f"band {int(rule_rows.band(0))}"] += 1
        assert int(rule_rows.band(0)) == (replies > 2) + (replies > 8)

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


NEAR = 2e-3
"""Of log-likelihoods in float32, in nats."""
TOKENS = 16
SHARING = Plan.banded(
    MODEL,
    (
        Band(2, (Rule(guaranteed=5, renormalise=0.5), Rule(top_k=6), Rule()) * (LAYERS // 3)),
        Band(8, (Rule(guaranteed=3), Rule(threshold=0.2), Rule(budget=20)) * (LAYERS // 3)),
    ),
    prompt=(
        Rule(top_k=4),
        Rule(),
        Rule(top_k=0),
        Rule(threshold=0.3),
        Rule(top_k=6),
        Rule(top_k=0),
    ),
)
"""Of the kind that `tune` finds: other rules by load and layer, and for prompts."""


def texts(*lengths: int) -> list[list[int]]:
    """Prompts of so many tokens, of the packaged text."""
    from transformers import AutoTokenizer

    from leanmoe.models.reference import path

    tokenizer = AutoTokenizer.from_pretrained(path())
    words = " ".join(
        f"The town of {name} lies on a river, and its people built a bridge in {1900 + number}."
        for number, name in enumerate(
            ["Ash", "Elm", "Oak", "Yew", "Fir", "Bay", "Box", "Fig", "Nut", "Haw", "Sloe", "Rowan"]
        )
    )
    found = tokenizer(words, add_special_tokens=False)["input_ids"]
    return [found[7 * number : 7 * number + length] for number, length in enumerate(lengths)]


def replies_of_vllm(llm: Any, prompts: list[list[int]]) -> tuple[list[list[int]], Tensor]:
    """Each prompt's reply and its tokens' log-likelihoods; all are sent at once."""
    from vllm import SamplingParams

    parameters = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, logprobs=0)
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs = [one.outputs[0] for one in llm.generate(inputs, parameters, use_tqdm=False)]
    values = [
        [step[token].logprob for step, token in zip(one.logprobs, one.token_ids, strict=True)]
        for one in outputs
    ]
    return [list(one.token_ids) for one in outputs], torch.tensor(values)


def replies_of_transformers(
    model: Any, plan: Plan, prompts: list[list[int]]
) -> tuple[list[list[int]], Tensor]:
    """The same in Transformers, whose prompts are one step each."""
    from leanmoe import apply

    ids = torch.tensor(prompts)
    with apply(model, plan), torch.no_grad():
        found = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False,
            eos_token_id=None, return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
    tokens = found.sequences[:, ids.shape[1] :]
    logits = torch.stack(found.logits, dim=1).float().log_softmax(-1)
    return tokens.tolist(), logits.gather(-1, tokens[..., None])[..., 0]


def test_replies_under_prompt_rules_are_those_of_transformers(load: Callable[..., Any]) -> None:
    """Long prompts come in chunks, one after the other; short ones are a batch that shares."""
    from leanmoe.runtime import load_model

    model = load_model("reference", "float32")[0]
    long, short = texts(100, 131, 60), texts(12, 12, 12, 12)
    llm = load(SHARING, max_num_batched_tokens=48, enable_chunked_prefill=True)
    for prompts in ([long[0]], [long[1]], [long[2]], short):
        tokens, values = replies_of_vllm(llm, prompts)
        wanted, likelihoods = replies_of_transformers(model, SHARING, prompts)
        assert tokens == wanted
        torch.testing.assert_close(values, likelihoods, atol=NEAR, rtol=0)
        bands_alone = SHARING.with_level(prompt=())
        _, other = replies_of_transformers(model, bands_alone, prompts)
        assert float((other - likelihoods).abs().max()) > 20 * NEAR, "else the test says nothing"


def test_chunks_and_neighbours_change_nothing_under_rules_of_tokens_alone(
    load: Callable[..., Any],
) -> None:
    """Prompts of all lengths at once, in steps of few rows, each as Transformers has it alone."""
    from leanmoe.runtime import load_model

    alone = Plan.banded(
        MODEL, (Band(None, (Rule(top_k=6), Rule(threshold=0.2)) * (LAYERS // 2)),),
        prompt=SHARING.prompt,
    )  # fmt: skip
    model = load_model("reference", "float32")[0]
    prompts = texts(1, 2, 9, 33, 70, 90, 131)
    llm = load(alone, max_num_batched_tokens=20, enable_chunked_prefill=True, max_num_seqs=5)
    tokens, values = replies_of_vllm(llm, prompts)
    for number, prompt in enumerate(prompts):
        wanted, likelihoods = replies_of_transformers(model, alone, [prompt])
        assert tokens[number] == wanted[0]
        torch.testing.assert_close(values[number], likelihoods[0], atol=NEAR, rtol=0)


def test_a_prompt_rule_that_shares_is_refused(load: Callable[..., Any]) -> None:
    with pytest.raises(LeanMoeError, match=r"prompt\.guaranteed is 2: prompt tokens share no"):
        load(SHARING.with_level(prompt=(Rule(guaranteed=2),) * LAYERS))
