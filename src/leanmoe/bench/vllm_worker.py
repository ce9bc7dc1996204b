"""A vLLM engine in a process of its own: reads jobs as JSON lines, answers with timelines.

    python -m leanmoe.bench.vllm_worker

The first line says how to start the engine, each line after it is one closed loop. Whether a plan
is at work is decided by LEANMOE_PLAN, which vLLM's plugin reads when this process starts. Answers
go to what was standard output; vLLM's own words go to standard error.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, TextIO


def main() -> None:
    """Serves jobs until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    engine, about = start_engine(json.loads(sys.stdin.readline()))
    _answer(answers, about)
    for line in sys.stdin:
        job = json.loads(line)
        _answer(answers, closed_loop(engine, job["requests"], job["together"], job["max_seconds"]))


def start_engine(settings: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The engine with prefix caching off, and what it is."""
    import vllm

    llm = vllm.LLM(**settings, enable_prefix_caching=False)
    return llm.llm_engine, {"vllm": vllm.__version__}


def closed_loop(
    engine: Any, requests: Sequence[Mapping[str, Any]], decode_batch: int, max_seconds: float
) -> list[dict[str, Any]]:
    """Keeps `decode_batch` requests under way until all are done; sends none after `max_seconds`.

    Each request has "prompt" (token ids) and "output" (tokens); each answer has "sent", "tokens"
    (when each came), "input" and "output". Decoding is greedy and never stops early.
    """
    start = time.perf_counter()
    sent: list[float] = []
    came: dict[str, list[float]] = {}
    finished: list[str] = []
    total = len(requests)
    while len(finished) < total:
        while len(sent) < total and len(sent) - len(finished) < decode_batch:
            if sent and time.perf_counter() - start > max_seconds:
                total = len(sent)
                break
            request, name = requests[len(sent)], str(len(sent))
            came[name] = []
            sent.append(time.perf_counter())
            prompt = {"prompt_token_ids": list(request["prompt"])}
            engine.add_request(name, prompt, sampling(int(request["output"])))
        for output in engine.step():
            now = time.perf_counter()
            tokens = output.outputs[0].token_ids if output.outputs else ()
            came[output.request_id] += [now] * len(tokens)
            if output.finished:
                finished.append(output.request_id)
    return [
        {
            "sent": sent[int(name)],
            "tokens": came[name],
            "input": len(requests[int(name)]["prompt"]),
            "output": len(came[name]),
        }
        for name in finished
    ]


def sampling(tokens: int) -> Any:
    """Greedy, so many tokens, each handed over as it comes."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        max_tokens=tokens,
        ignore_eos=True,
        temperature=0.0,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )


def _answer(stream: TextIO, value: Any) -> None:
    stream.write(json.dumps(value) + "\n")
    stream.flush()


if __name__ == "__main__":
    main()
