"""One engine of SGLang in a process of its own: what it answers, or how fast it is.

    python -m benchmarks.sglang.engine_process REQUEST.json ANSWER.json

A process that hangs or dies takes nothing with it: whoever started it ends it, with all of its
group. The answer is written as it grows.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from leanmoe.core.files import write_json

GREEDY = {"temperature": 0, "ignore_eos": True}
WARM_STEPS = 3
"""Decode steps that are not timed: the first ones find the scheduler still starting others."""


def main() -> None:
    """Runs what the request asks."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("request", type=Path, help="a JSON file: what to do, with which settings")
    parser.add_argument("answer", type=Path, help="the JSON file that is written")
    options = parser.parse_args()
    request = json.loads(options.request.read_text(encoding="utf-8"))
    import sglang

    begin = time.perf_counter()
    engine = sglang.Engine(**request["settings"])
    answer = Answer(options.answer, {"start_s": round(time.perf_counter() - begin, 1)})
    do = {"tokens": answer_tokens, "times": measure}[request["do"]]
    try:
        do(engine, request, answer)
    finally:
        engine.shutdown()


class Answer:
    """What is known so far, on disk."""

    def __init__(self, path: Path, content: dict[str, Any]) -> None:
        self.path, self.content = path, content
        self.write()

    def write(self) -> None:
        """Writes all that is known."""
        write_json(self.path, self.content)


def prompts(requests: int, vocabulary: int, length: int | None = None) -> list[list[int]]:
    """Drawn token ids of so many prompts, of one length or of lengths that differ."""
    draw = random.Random(requests)
    return [
        [draw.randrange(vocabulary) for _ in range(length or 8 + 3 * n)] for n in range(requests)
    ]


def answer_tokens(engine: Any, request: dict[str, Any], answer: Answer) -> None:
    """Greedy replies at each load, several times: what is not the same twice is noise."""
    answer.content["tokens"] = {}
    for load in request["loads"]:
        sampling = GREEDY | {"max_new_tokens": request["reply"]}
        ids = prompts(load, request["vocabulary"])
        answer.content["tokens"][str(load)] = [
            [
                reply["output_ids"]
                for reply in engine.generate(input_ids=ids, sampling_params=sampling)
            ]
            for _ in range(request["turns"])
        ]
        answer.write()


class Asked:
    """SGLang's scheduler with the benchmark's methods; answers come by files."""

    def __init__(self, engine: Any, folder: Path) -> None:
        self._engine, self._folder, self._number = engine, folder, 0

    def __call__(self, method: str, **arguments: Any) -> Any:
        """What one method returns."""
        self._number += 1
        path = self._folder / f"{self._number}.json"
        self._engine.collective_rpc(f"leanmoe_{method}", answer=str(path), **arguments)
        return json.loads(path.read_text(encoding="utf-8"))["answer"]


def measure(engine: Any, request: dict[str, Any], answer: Answer) -> None:
    """Padding first, then rounds of decode steps and prompts, every variant in each in turn."""
    folder = answer.path.parent / "asked"
    folder.mkdir(exist_ok=True)
    ask = Asked(engine, folder)
    answer.content |= {
        "plans": request["variants"],
        "padding": [],
        "decode": [],
        "prefill": [],
        "paper": [],
    }
    engine.generate(input_ids=prompts(2, 100), sampling_params=GREEDY | {"max_new_tokens": 8})
    ask("draw", routing="skewed", seed=0)
    answer.content["padding"] = [padding(engine, ask, name) for name in request["batch_aware"]]
    answer.write()
    for number in range(request["rounds"]):
        for routing, load in [(r, n) for r in request["routings"] for n in request["loads"]]:
            ask("draw", routing=routing, seed=1000 * number + load)
            variants = list(request["variants"])
            random.Random(number).shuffle(variants)
            for variant in variants:
                if time.time() > request["until"]:
                    return
                point = {"round": number, "routing": routing, "requests": load, "plan": variant}
                answer.content["decode"].append(point | decode(engine, ask, variant, load, request))
        for tokens in request["prompts"]:
            ask("draw", routing="skewed", seed=tokens)
            for variant in request["variants"]:
                ask("select", variant=variant)
                taken = prompt_ms(engine, tokens, request["vocabulary"])
                point = {"round": number, "tokens": tokens, "plan": variant}
                answer.content["prefill"].append(point | {"prompt_ms": taken})
        answer.write()
    answer.content["is_complete"] = True
    answer.content["paper"] = paper_loads(engine, ask, request)
    answer.write()


def padding(engine: Any, ask: Asked, variant: str) -> dict[str, Any]:
    """Whether a captured step of 8 rows leaves out the one that is no token, and is told of it."""
    ask("select", variant=variant)
    ask("counts")
    engine.generate(input_ids=prompts(7, 100, 16), sampling_params=GREEDY | {"max_new_tokens": 12})
    counts = ask("counts")
    told = [count for requests, count in counts if requests == 7]
    wrong = sum(count != requests for requests, count in counts)
    found = ask("padding", rows=8, real=7)
    return {"plan": variant, "steps_of_7": len(told), "counts_wrong": wrong, **found}


def decode(
    engine: Any, ask: Asked, variant: str, load: int, request: dict[str, Any]
) -> dict[str, Any]:
    """One measurement: the captured step alone, the engine's steps, and the experts of a step."""
    ask("select", variant=variant)
    ask("steps")
    sampling = GREEDY | {"max_new_tokens": request["steps"] + WARM_STEPS}
    ids = prompts(load, request["vocabulary"], request["prompt"])
    engine.generate(input_ids=ids, sampling_params=sampling)
    engine_ms = step_of(ask("steps"), load)
    found: dict[str, Any] = {"engine_ms": engine_ms, "tokens_per_second": load / engine_ms * 1e3}
    if request["is_captured"]:
        found["step_ms"] = ask("step_ms", rows=load, replays=request["replays"])
        found |= ask("chosen", rows=load)
    return found


def step_of(steps: Sequence[Sequence[float]], load: int) -> float:
    """Milliseconds between the starts of two decode steps of so many requests, the median."""
    starts = [start for requests, start in steps if requests == load][WARM_STEPS - 1 :]
    if len(starts) < 2:
        raise ValueError(f"SGLang ran {len(starts)} decode steps of {load} requests")
    return 1e3 * median(b - a for a, b in pairwise(starts))


def prompt_ms(engine: Any, tokens: int, vocabulary: int) -> float:
    """Milliseconds of one prompt of so many tokens and its first reply token."""
    ids = prompts(1, vocabulary, tokens)
    begin = time.perf_counter()
    engine.generate(input_ids=ids, sampling_params=GREEDY | {"max_new_tokens": 1})
    return 1e3 * (time.perf_counter() - begin)


def paper_loads(engine: Any, ask: Asked, request: dict[str, Any]) -> list[dict[str, Any]]:
    """The paper's own loads: prompts of 1,024 tokens, replies of 1,024, all requests at once."""
    found: list[dict[str, Any]] = []
    for load in request["paper"]:
        for variant in request["variants"]:
            if time.time() > request["until"]:
                return found
            ask("select", variant=variant)
            ids = prompts(load, request["vocabulary"], 1024)
            begin = time.perf_counter()
            engine.generate(input_ids=ids, sampling_params=GREEDY | {"max_new_tokens": 1024})
            taken = time.perf_counter() - begin
            rate = load * 1024 / taken
            found.append({"requests": load, "plan": variant, "output_tokens_per_second": rate})
    return found


if __name__ == "__main__":
    main()
