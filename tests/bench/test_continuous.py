"""When requests are sent, and attention by request: what Transformers' own computes."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
import torch

from leanmoe.bench.continuous import (
    Arrivals,
    Room,
    attend_per_request,
    attention_per_request,
    run,
    served,
)
from leanmoe.bench.measurement import Request
from leanmoe.core.errors import LeanMoeError
from leanmoe.runtime import load_model


@dataclass
class Output:
    request_id: str
    generated_tokens: list[int]
    timestamps: list[float]
    error: str | None = None

    def is_finished(self) -> bool:
        return True


@dataclass
class Manager:
    """A service that takes `seconds` a request, however many are under way."""

    seconds: float = 0.0
    error: str | None = None
    running: bool = True
    sent: list[float] = field(default_factory=list)
    most: int = 0
    waiting: list[tuple[float, str, int]] = field(default_factory=list)

    def add_request(self, _prompt: list[int], max_new_tokens: int, **_: Any) -> str:
        now = time.perf_counter()
        self.sent.append(now)
        self.waiting.append((now + self.seconds, f"r{len(self.sent)}", max_new_tokens))
        self.most = max(self.most, len(self.waiting))
        return self.waiting[-1][1]

    def get_result(self, timeout: float) -> Output | None:
        if not self.waiting:
            time.sleep(timeout)
            return None
        ready, name, tokens = self.waiting[0]
        now = time.perf_counter()
        time.sleep(min(timeout, max(0.0, ready - now)))
        if time.perf_counter() < ready:
            return None
        self.waiting.pop(0)
        stamps = [ready - 0.001 * n for n in range(tokens)][::-1]
        return Output(name, [1] * tokens, stamps, self.error)

    def is_running(self) -> bool:
        return self.running


REQUESTS = [Request((1, 2, 3), 2 + n % 3) for n in range(40)]


def test_a_closed_loop_is_full_and_never_fuller() -> None:
    manager = Manager(0.002)
    timelines = run(manager, REQUESTS, Arrivals(5))
    assert manager.most == 5
    assert [t.output_tokens for t in timelines] == [r.output_tokens for r in REQUESTS]
    assert all(t.input_tokens == 3 and t.delay == 0 for t in timelines)


def test_poisson_arrivals_have_their_rate_and_spread() -> None:
    many = Arrivals.poisson(8.0, 20_000, "seed")
    due = [many.wait(n, 0, 0.0) for n in range(20_000)]
    gaps = [b - a for a, b in pairwise(due)]
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(1 / 8, rel=0.03)
    deviation = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / len(gaps))
    assert deviation == pytest.approx(mean, rel=0.05), "an exponential's deviation is its mean"
    again = Arrivals.poisson(8.0, 20_000, "seed")
    assert again.wait(100, 0, 0.0) == due[100]
    assert Arrivals.poisson(8.0, 20_000, "other").wait(100, 0, 0.0) != due[100]


def test_an_open_loop_sends_at_its_times_whatever_is_under_way() -> None:
    manager = Manager(0.5)
    gaps = [0.0, 0.05, 0.1, 0.02, 0.08]
    timelines = run(manager, REQUESTS[:5], Arrivals(5, gaps))
    found = [b - a for a, b in pairwise(manager.sent)]
    assert found == pytest.approx(gaps[1:], abs=0.03)
    assert manager.most == 5, "none waited for another"
    assert max(t.delay for t in timelines) < 0.03


def test_nothing_is_sent_after_the_time_is_up() -> None:
    manager = Manager(0.02)
    timelines = run(manager, REQUESTS, Arrivals(1), max_seconds=0.1)
    assert 3 <= len(timelines) < 10


def test_failures_are_raised() -> None:
    with pytest.raises(LeanMoeError, match="failed on a request: out of pages"):
        run(Manager(error="Traceback\nout of pages"), REQUESTS, Arrivals(1))
    with pytest.raises(LeanMoeError, match="stopped before"):
        run(Manager(5.0, running=False), REQUESTS, Arrivals(1))


def test_room_takes_whole_prompts_and_a_page_a_request() -> None:
    assert Room(4, 256, 288).page == 512
    assert Room(4, 256, 288).step_tokens == 2048 + 4
    assert Room(4, 300, 320).step_tokens == 1800 + 4
    assert Room(4, 5000, 5100).step_tokens == 2048 + 4


PAGE, WIDTH = 64, 8


class Module:
    layer_idx = 0


class Model:
    class config:  # noqa: N801
        _attn_implementation = "sdpa"


def keywords(lengths: list[tuple[int, int]], pages: list[int]) -> dict[str, Any]:
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
def reference_model() -> Any:
    return load_model("reference")


def test_the_service_writes_what_generate_writes(reference_model: Any) -> None:
    model, tokenizer = reference_model
    text = "The list methods make it very easy to use a list as a stack, where the last element"
    ids = tokenizer(text)["input_ids"]
    prompts = [ids[:12], ids[2:14], ids[4:16]]
    requests = [Request(tuple(prompt), 6) for prompt in prompts]
    made: dict[str, list[int]] = {}
    with served(model, Room(2, 12, 18), 6) as manager:
        real = manager.get_result

        def keep(**settings: Any) -> Any:
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
