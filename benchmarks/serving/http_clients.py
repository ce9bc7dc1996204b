"""Do `leanmoe bench` and `vllm bench serve` agree about one server, and if not, why not?

    python -m benchmarks.serving.http_clients http://127.0.0.1:8000 --tokenizer reference

Both send closed loops to the same server, one after the other, in an order drawn anew for each
repeat; no prompt is sent twice, but for vLLM's ready check and warm-up. Its client runs as its
users run it, and with one thing after the other made as leanmoe has it: greedy, the same prompts, a
warm-up. Before that its plain form runs a few times on the server as it was found: where that was
started just before, they say how a first run differs from the next. It needs vLLM and
leanmoe[bench] in one environment.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import json
import random
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common.results import collect, file_of, parser_of, write
from leanmoe.bench.measurement import Request
from leanmoe.bench.over_http import OverHTTP
from leanmoe.bench.run import load_tokenizer, make_supply
from leanmoe.bench.servers import Server, ask, read_address
from leanmoe.bench.settings import BenchSettings, Lengths, ServiceLoad
from leanmoe.bench.sweep import few_requests, measured
from leanmoe.stats.runs import Ratio

OURS = "leanmoe bench"
CLIENTS: dict[str, dict[str, bool]] = {
    "vllm bench serve": {},
    "greedy": {"greedy": True},
    "greedy, our prompts": {"greedy": True, "ours": True},
    "greedy, our prompts, warmed": {"greedy": True, "ours": True, "warmed": True},
}
FIGURES = ("output_throughput", "median_ttft_ms", "median_tpot_ms", "duration")
TURNAROUND = "median_turnaround_ms"


def parse() -> argparse.Namespace:
    """The command line."""
    parser = parser_of(__doc__)
    parser.add_argument("url")
    parser.add_argument("--tokenizer", default="reference")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--input-len", type=int, default=64)
    parser.add_argument("--output-len", type=int, default=16)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--first", type=int, default=4, help="runs on the server as it was found")
    return parser.parse_args()


class Clients:
    """Both clients on one server."""

    def __init__(self, asked: argparse.Namespace) -> None:
        lengths = Lengths(asked.input_len, asked.input_len)
        replies = Lengths(asked.output_len, asked.output_len)
        self.settings = BenchSettings(
            targets=(asked.url,),
            tokenizer=asked.tokenizer,
            input_len=lengths,
            output_len=replies,
            num_prompts=asked.requests,
            max_seconds=120,
        )
        self.server: Server = ask(read_address(asked.url))
        self.tokenizer = load_tokenizer(self.settings, [self.server])
        _, self.supply = make_supply(self.settings, self.tokenizer)
        self.ours = OverHTTP([self.server], self.tokenizer, self.settings, self.supply)

    def requests(self, load: ServiceLoad, name: str) -> list[Request]:
        """Prompts that no other run has."""
        return self.supply.draw(load, name)

    def leanmoe(self, load: ServiceLoad, requests: list[Request]) -> dict[str, Any]:
        """One run of `leanmoe bench`'s client."""
        with self.ours.at(load) as run_one:
            outcome = run_one(self.server.name, load, requests, "0")
        sent = [timeline.sent for timeline in outcome.timelines]
        ends = [timeline.tokens[-1] for timeline in outcome.timelines]
        gap = turnaround_ms(sent, ends, load.concurrency or 1)
        return {**measured(outcome, load, self.settings).to_vllm_json(), TURNAROUND: gap}

    def vllm(
        self,
        load: ServiceLoad,
        requests: list[Request],
        seed: int,
        *,
        greedy: bool = False,
        ours: bool = False,
        warmed: bool = False,
    ) -> dict[str, Any]:
        """One run of `vllm bench serve`; `requests` are what it sends if `ours`."""
        from vllm.benchmarks.serve import add_cli_args, main_async

        parser = argparse.ArgumentParser()
        add_cli_args(parser)
        words = ["--backend", "openai", "--base-url", self.server.url]
        words += ["--endpoint", "/v1/completions", "--model", self.server.model]
        words += ["--tokenizer", str(self.tokenizer.name_or_path), "--ignore-eos", "--disable-tqdm"]
        words += ["--max-concurrency", str(load.concurrency), "--num-prompts", str(load.requests)]
        words += ["--seed", str(seed), "--save-detailed"]
        words += ["--temperature", "0"] if greedy else []
        words += ["--num-warmups", str(load.concurrency)] if warmed else []
        with tempfile.TemporaryDirectory() as folder:
            if ours:
                file = Path(folder) / "prompts.jsonl"
                rows = [{"prompt": self.tokenizer.decode(list(r.prompt))} for r in requests]
                file.write_text("".join(json.dumps(row) + "\n" for row in rows))
                words += ["--dataset-name", "custom", "--dataset-path", str(file)]
                words += ["--skip-chat-template", "--disable-shuffle", "--custom-output-len"]
                words += [str(requests[0].output_tokens)]
            else:
                words += ["--dataset-name", "random", "--random-range-ratio", "0"]
                words += ["--random-input-len", str(len(requests[0].prompt))]
                words += ["--random-output-len", str(requests[0].output_tokens)]
            with contextlib.redirect_stdout(io.StringIO()):
                found = asyncio.run(main_async(parser.parse_args(words)))
        return {**{name: found[name] for name in FIGURES}, **between_tokens(found)}


def between_tokens(found: dict[str, Any]) -> dict[str, Any]:
    """Of vLLM's run: counts, and what leanmoe counts otherwise."""
    starts = found["start_times"]
    ends = [
        start + ttft + sum(gaps)
        for start, ttft, gaps in zip(starts, found["ttfts"], found["itls"], strict=True)
    ]
    seconds = max(ends) - min(starts)
    return {
        "output_throughput_between_tokens": found["total_output_tokens"] / seconds,
        TURNAROUND: turnaround_ms(starts, ends, found["max_concurrency"]),
        "completed": found["completed"],
        "total_input_tokens": found["total_input_tokens"],
        "total_output_tokens": found["total_output_tokens"],
    }


def turnaround_ms(starts: list[float], ends: list[float], decode_batch: int) -> float | None:
    """From a request's last token to the next request that takes its place: median, if any."""
    gaps = [b - a for a, b in zip(sorted(ends), sorted(starts)[decode_batch:], strict=False)]
    return 1e3 * median(gaps) if gaps else None


def one_load(clients: Clients, load: ServiceLoad, repeats: int, rng: random.Random) -> Any:
    """The runs of all clients, by client."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in (OURS, *CLIENTS)}
    few = few_requests(clients.supply, load)
    clients.leanmoe(replace(load, requests=len(few)), few)
    for repeat in range(repeats):
        for name in rng.sample(list(runs), len(runs)):
            requests = clients.requests(load, f"{name} {repeat}")
            if name == OURS:
                found = clients.leanmoe(load, requests)
            else:
                found = clients.vllm(load, requests, rng.randrange(2**31), **CLIENTS[name])
            runs[name].append(found)
    return runs


def show(load: ServiceLoad, runs: dict[str, list[dict[str, Any]]]) -> None:
    """Medians over repeats, and each client's throughput over ours."""
    shown = (*FIGURES, TURNAROUND)
    print(f"{load.name}: client, then {', '.join(shown)}; output throughput over ours (95%)")
    first = [run["output_throughput"] for run in runs[OURS]]
    for name, found in runs.items():
        figures = "  ".join(f"{median(run[f] for run in found):9.2f}" for f in shown)
        ratio = Ratio.of(first, [run["output_throughput"] for run in found])
        said = f"{ratio.median:.3f} ({ratio.low:.3f} to {ratio.high:.3f})"
        print(f"  {name:30}{figures}  {'' if name == OURS else said}", flush=True)


def main() -> None:
    """Measures, prints and writes it."""
    asked = parse()
    clients, rng = Clients(asked), random.Random(0)
    loads = [ServiceLoad(asked.requests, concurrency=c) for c in asked.concurrency]
    middle = loads[len(loads) // 2]
    made = collect(seed=0)
    path = file_of(asked.output, "http-clients", made)
    found: dict[str, Any] = {
        "http_clients": 1,
        "input_len": asked.input_len,
        "output_len": asked.output_len,
        "first": {
            "load": middle.to_json(),
            "runs": [
                clients.vllm(middle, clients.requests(middle, "first"), rng.randrange(2**31))
                for _ in range(asked.first)
            ],
        },
        "loads": [],
    }
    speeds = [f"{run['output_throughput']:.1f}" for run in found["first"]["runs"]]
    print(f"as it was found, {middle.name}: output tokens/s {', '.join(speeds)}", flush=True)
    for load in loads:
        runs = one_load(clients, load, asked.repeats, rng)
        show(load, runs)
        found["loads"].append({**load.to_json(), "runs": runs})
        write(path, made, "measured", found)
    print(path)


if __name__ == "__main__":
    main()
