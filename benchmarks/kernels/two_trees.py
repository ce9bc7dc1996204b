"""Are two checkouts' kernels as fast as each other? One interleaved run on one machine.

    git worktree add /tmp/before 70e8c80
    python -m benchmarks.kernels.two_trees --before /tmp/before --device cuda

Each checkout has a process of its own, which holds the same random weights and inputs. The two time
the same calls one after the other, round after round, so that what the machine does meanwhile meets
both. Shown is the median over rounds of after / before, with the middle half of the rounds. The
least and the most that two equal checkouts come to are seen with the same folder twice. A copy
without its history says its commit in a file COMMIT.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from statistics import median, quantiles
from typing import IO, Any

from benchmarks.common.results import collect, file_of, parser_of, write

ROUNDS = 15
SHAPES = {
    "cuda": {"qwen3-30b": (128, 2048, 768, 8), "deepseek-v3": (256, 7168, 2048, 8)},
    "cpu": {"reference": (64, 224, 48, 8)},
}
"""Experts, hidden width, expert width and experts a token of the layers that are timed."""
TOKENS = {"cuda": (1, 8, 32, 128, 4096), "cpu": (1, 8, 32, 256)}
RULES: dict[str, dict[str, Any]] = {
    "full": {},
    "top_k=4": {"top_k": 4},
    "guaranteed=3": {"guaranteed": 3},
    "budget": {"budget": 24},
    "top_p=0.7": {"top_p": 0.7},
}
WORKER = r"""
import json, sys, time
from functools import partial
import torch
from leanmoe.kernels import ExpertWeights, Gate
from leanmoe.plan import Rule
try:
    from leanmoe.models.routers import Router
except ImportError:  # a checkout from before the move
    from leanmoe.routers import Router
device, shapes, sizes, rules = json.loads(sys.stdin.readline())
torch.set_num_threads(1)
calls = {}
for shape, (experts, hidden, width, slots) in shapes.items():
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    draw = partial(torch.randn, device=device)
    up = draw(experts, 2 * width, hidden, dtype=dtype).mul_(0.02)
    down = draw(experts, hidden, width, dtype=dtype).mul_(0.02)
    weights = ExpertWeights(up, down, gate=Gate("silu"))
    for tokens in sizes:
        inputs_TD = draw(tokens, hidden).to(dtype)
        logits_TE = draw(tokens, experts)
        for name, fields in rules.items():
            rule, router = Rule(**fields), Router(normalise=True)
            if device == "cuda":
                from leanmoe.kernels import experts_gpu as run, route_gpu as route
            else:
                from leanmoe.kernels import experts_cpu as run, route_cpu as route
            def choose(logits_TE=logits_TE, rule=rule, router=router, slots=slots, route=route):
                return route(logits_TE, router, slots, rule)
            routed = choose()
            ids_TK, weights_TK = (part.reshape(tokens, -1) for part in routed[:2])
            calls[f"{shape} T={tokens} {name} route"] = choose
            calls[f"{shape} T={tokens} {name} experts"] = partial(
                run, inputs_TD, ids_TK, weights_TK, weights
            )
def captured(call):
    call(); torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(8):
            call()
    return graph
graphs = {name: captured(call) for name, call in calls.items()} if device == "cuda" else {}
def took(name):
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record(); graphs[name].replay(); end.record(); end.synchronize()
        return start.elapsed_time(end) / 8 * 1e3
    calls[name]()
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < 0.02 or count < 3:
        calls[name](); count += 1
    return (time.perf_counter() - began) / count * 1e6
print(json.dumps(list(calls)), flush=True)
for line in sys.stdin:
    print(took(line.strip()), flush=True)
"""
"""What each process runs: it times a call each time that its name comes in."""


class Checkout:
    """A process that runs one checkout's kernels."""

    def __init__(self, tree: Path, device: str) -> None:
        """Starts the process and waits until all calls are compiled."""
        environment = {**os.environ, "PYTHONPATH": str(tree / "src"), "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        self._send(json.dumps([device, SHAPES[device], TOKENS[device], RULES]))
        self.calls: list[str] = json.loads(self._read())

    def time(self, call: str) -> float:
        """Microseconds of one call."""
        self._send(call)
        return float(self._read())

    def _send(self, line: str) -> None:
        stream: IO[str] | None = self._process.stdin
        assert stream is not None
        print(line, file=stream, flush=True)

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"a checkout's process ended with {self._process.wait()}")
        return line


def compare(before: Checkout, after: Checkout, rounds: int) -> list[dict[str, Any]]:
    """Each call's times in both checkouts, and the ratio over rounds."""
    times: dict[str, list[tuple[float, float]]] = {call: [] for call in after.calls}
    order = random.Random(0)
    for number in range(rounds + 1):
        for call in order.sample(after.calls, len(after.calls)):
            pair = [(side, side.time(call)) for side in order.sample([before, after], 2)]
            if number:  # the first round warms up
                took = dict(pair)
                times[call].append((took[before], took[after]))
    rows = []
    for call, pairs in times.items():
        ratios = [second / first for first, second in pairs]
        low, _, high = quantiles(ratios, n=4)
        rows.append(
            {
                "call": call,
                "before_us": median(first for first, _ in pairs),
                "after_us": median(second for _, second in pairs),
                "ratio": median(ratios),
                "middle_half": [low, high],
            }
        )
    return rows


def commit_of(tree: Path) -> str:
    """The commit of a checkout, with "+dirty" where it was changed."""
    if (named := tree / "COMMIT").is_file():
        return named.read_text(encoding="utf-8").strip()
    if said := os.environ.get("LEANMOE_COMMIT"):
        return said
    words = ["git", "-C", str(tree), "describe", "--always", "--dirty=+dirty", "--abbrev=12"]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    """Compares two checkouts, writes JSON, prints a table."""
    parser = parser_of(__doc__)
    parser.add_argument("--before", type=Path, required=True, help="the other checkout's folder")
    parser.add_argument("--after", type=Path, default=Path(), help="this checkout, if left out")
    parser.add_argument("--device", choices=sorted(SHAPES), default="cpu")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    given = parser.parse_args()
    if given.device == "cuda":
        import torch  # noqa: F401, names the GPU in the provenance
    made = collect(seed=0)
    trees = {"before": given.before.resolve(), "after": given.after.resolve()}
    before, after = (Checkout(tree, given.device) for tree in trees.values())
    rows = compare(before, after, given.rounds)
    commits = {name: commit_of(tree) for name, tree in trees.items()}
    path = file_of(given.output, f"two-trees-{given.device}", made)
    content = {"device": given.device, "rounds": given.rounds, "commits": commits, "calls": rows}
    print(write(path, made, "measured", content))
    for row in rows:
        low, high = row["middle_half"]
        print(
            f"{row['call']:44s} {row['before_us']:10.1f} us {row['after_us']:10.1f} us  "
            f"{row['ratio']:.3f} ({low:.3f} to {high:.3f})"
        )
    ratios = [row["ratio"] for row in rows]
    print(f"after / before, median over {len(rows)} calls: {median(ratios):.3f}", end=", ")
    print(f"from {min(ratios):.3f} to {max(ratios):.3f}")


if __name__ == "__main__":
    main()
