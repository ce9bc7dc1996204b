"""Attention by request: what Transformers' own computes, whatever a step mixes."""

from __future__ import annotations

import pytest
import torch

from leanmoe.bench.attention import attend_per_request, attention_per_request
from leanmoe.bench.continuous import Arrivals, Room, run, served
from leanmoe.bench.metrics import Request
from leanmoe.core.errors import LeanMoeError
from leanmoe.runtime import load_model

PAGE, WIDTH = 64, 8


class Module:
    layer_idx = 0


class Model:
    class config:  # noqa: N801
        _attn_implementation = "sdpa"


def keywords(lengths: list[tuple[int, int]], pages: list[int]) -> dict:
    """`lengths`: new tokens and cached tokens of each request, each in a page of its own."""
    new = [n for n, _ in lengths]
    known = [n + c for n, c in lengths]
    slots = [
        page * PAGE + c + place
        for (n, c), page in zip(lengths, pages, strict=True)
        for place in range(n)
    ]
    starts = torch.tensor([0, *torch.tensor(new).cumsum(0).tolist()], dtype=torch.int32)
    total = torch.tensor([0, *torch.tensor(known).cumsum(0).tolist()], dtype=torch.int32)
    return {
        "cu_seq_lens_q": starts,
        "cu_seq_lens_k": {"full_attention": total},
        "write_index": [torch.tensor(slots)],
    }


def reference(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The last tokens of a sequence over all of it, by hand; 4 query heads to 2 cached ones."""
    new, known = query.shape[1], key.shape[1]
    key, value = key.repeat_interleave(2, 0), value.repeat_interleave(2, 0)
    scores = query @ key.transpose(1, 2) * 0.3
    hidden = torch.ones(new, known, dtype=torch.bool).triu(known - new + 1)
    return scores.masked_fill(hidden, float("-inf")).softmax(dim=-1) @ value


def test_prompts_chunks_and_single_tokens_in_mixed_steps() -> None:
    torch.manual_seed(0)
    pages = [5, 2, 9]
    steps = [[(6, 0), (9, 0)], [(1, 6), (4, 9), (7, 0)], [(1, 7), (1, 13), (1, 7)]]
    kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    with attention_per_request(Model(), PAGE):
        for step in steps:
            tokens = sum(n for n, _ in step)
            query, key, value = (torch.randn(1, heads, tokens, WIDTH) for heads in (4, 2, 2))
            out, _ = attend_per_request(
                Module(), query, key, value, None, 0.3, **keywords(step, pages[: len(step)])
            )
            first = 0
            for request, (new, _) in enumerate(step):
                here = slice(first, first + new)
                before = kept.get(request, (key[0, :, :0], value[0, :, :0]))
                kept[request] = (
                    torch.cat([before[0], key[0, :, here]], dim=1),
                    torch.cat([before[1], value[0, :, here]], dim=1),
                )
                expected = reference(query[0, :, here], *kept[request])
                torch.testing.assert_close(out[0, here].transpose(0, 1), expected)
                first += new
    assert Model.config._attn_implementation == "sdpa"


def test_one_served_model_at_a_time() -> None:
    with (
        attention_per_request(Model(), PAGE),
        pytest.raises(LeanMoeError, match="one at a time"),
        attention_per_request(Model(), PAGE),
    ):
        pass


@pytest.fixture(scope="module")
def reference_model():
    return load_model("reference")


def test_the_service_writes_what_generate_writes(reference_model) -> None:
    model, tokenizer = reference_model
    text = "The list methods make it very easy to use a list as a stack, where the last element"
    ids = tokenizer(text)["input_ids"]
    prompts = [ids[:12], ids[2:14], ids[4:16]]
    requests = [Request(tuple(prompt), 6) for prompt in prompts]
    made: dict[str, list[int]] = {}
    with served(model, Room(2, 12, 18), 6) as manager:
        real = manager.get_result

        def keep(**settings):
            output = real(**settings)
            if output is not None and output.is_finished():
                made[output.request_id] = list(output.generated_tokens)
            return output

        manager.get_result = keep
        timelines = run(manager, requests, Arrivals(2))
    assert len(timelines) == 3
    for prompt, tokens in zip(prompts, [made[name] for name in sorted(made)], strict=True):
        expected = model.generate(
            torch.tensor([prompt]), max_new_tokens=6, do_sample=False, eos_token_id=-1
        )
        assert expected[0, len(prompt) :].tolist() == tokens
