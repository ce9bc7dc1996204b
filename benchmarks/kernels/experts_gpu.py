"""How fast are a MoE layer's routing and experts on this GPU: leanmoe against its peers?

    python -m benchmarks.kernels.experts_gpu --vllm installed

Every implementation computes the same calls in the same run. A call is captured in a CUDA graph on
several inputs, so that caches do not flatter; graphs are replayed one after the other, in an order
that changes from round to round; shown are medians. Weights and inputs are random. Shares are of
the GPU's memory bandwidth by its datasheet (or `--bandwidth`) for the weights of the distinct
experts, and of the rate it reaches in a dense product in the same run. How fast it reads at best,
nothing computed, is measured beside.

Shapes: T tokens, K slots a token, E experts, D hidden width, M expert width.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from benchmarks.common.results import collect, file_of, parser_of, write
from benchmarks.kernels.peers import MOST_GATHERED, STOCK, Inputs, Stock, Vllm, torch_grouped
from leanmoe.kernels import ExpertWeights, experts_gpu, experts_reference, route_gpu
from leanmoe.kernels.triton.timing import Captured
from leanmoe.kernels.triton.tune_tiles import random_weights
from leanmoe.kernels.triton.tuned_tiles import Shape, config_for
from leanmoe.models.routers import Router
from leanmoe.plan import Rule
from leanmoe.routing import route

V3, V3_FP8 = (Shape(256, 7168, 2048, 8, name) for name in ("bfloat16", "float8_e4m3fn"))
QWEN = Shape(128, 2048, 768, 8, "bfloat16")
POINTS = (
    (QWEN, (1, 2, 4, 8, 32, 128, 4096)),
    (V3, (1, 8, 16, 32, 64, 128, 256, 4096)),
    (V3_FP8, (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)),
)
NAMES = {"qwen3": QWEN, "v3": V3, "v3-fp8": V3_FP8}
RULES = {
    "k=8": Rule(),
    "k=6": Rule(top_k=6),
    "k=4": Rule(top_k=4),
    "guaranteed=3": Rule(guaranteed=3),
}
ROUTE_RULES = {
    **RULES,
    "threshold": Rule(threshold=0.4),
    "top_p": Rule(top_p=0.7),
    "budget=64": Rule(budget=64),
    "guaranteed=3, budget=64": Rule(guaranteed=3, budget=64),
    "200 experts": Rule(experts=tuple(range(200))),
}
ROUTERS = {
    "DeepSeek-V3": Router("sigmoid", "bias", True, 1e-20, 2.5, 8, 4, "top2_sum", False),
    "softmax": Router(normalise=True),
}
ROUTE_TOKENS = (1, 8, 32, 128, 512, 16384)
BANDWIDTHS = {"H200": 4.8e12, "H100 80GB HBM3": 3.35e12}
"""Bytes a second by NVIDIA's datasheets, by what is in the GPU's name."""
EXACT_TOKENS = 2
"""Errors are those of so many tokens: each expert is made float64 for them."""
ROUNDS = 15
DEVICE = "cuda"


@dataclass(frozen=True)
class Line:
    """All implementations on the same calls."""

    shape: str
    tokens: int
    rule: str
    distinct: float
    """Active experts, mean over the inputs."""
    rows: float
    microseconds: dict[str, float]
    quartiles: dict[str, tuple[float, float]]
    relative_error: dict[str, float]
    """Against float64, on the first tokens."""


def timed(calls: Mapping[str, Sequence[Callable[[], object]]]) -> dict[str, list[float]]:
    """Microseconds a call, by implementation and round."""
    graphs = {name: Captured(group) for name, group in calls.items()}
    order = random.Random(0)
    found: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(ROUNDS + 1):
        for name, graph in order.sample(list(graphs.items()), len(graphs)):
            took = graph.time()
            if number:
                found[name].append(took)
    return found


def draw(shape: Shape, tokens: int, rule: Rule, seed: int, unused: Tensor | None = None) -> Inputs:
    """Random hidden states, routed by random logits under the rule, to experts not `unused`."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    dtype = torch.bfloat16
    hidden_TD = torch.randn(tokens, shape.hidden, generator=generator, device=DEVICE).to(dtype)
    logits_TE = torch.randn(tokens, shape.experts, generator=generator, device=DEVICE)
    if unused is not None:
        logits_TE[:, unused[unused < shape.experts]] = -1e4
    routed = route_gpu(logits_TE, Router(normalise=True), shape.slots, rule)
    return hidden_TD, routed.ids_TK, routed.weights_TK


def draw_all(shape: Shape, tokens: int, rule: Rule) -> list[Inputs]:
    """The inputs of one graph: many where calls are short, as layers follow each other in a step.

    Where few experts are active the next call activates others: none can lie in the L2 cache.
    """
    count = 16 if tokens <= 8 else 4 if tokens <= 64 else 2 if tokens <= 512 else 1
    found: list[Inputs] = []
    for seed in range(count):
        is_few = found and tokens * shape.slots <= shape.experts // 8
        found.append(draw(shape, tokens, rule, seed, found[-1][1] if is_few else None))
    return found


def measure(
    shape: Shape, tokens: int, weights: ExpertWeights, stock: Stock | None, vllm: Vllm | None
) -> Line:
    """leanmoe and its peers at one point, the full model."""
    inputs = draw_all(shape, tokens, Rule())
    calls: dict[str, list[Callable[[], Any]]] = {
        "leanmoe": [partial(experts_gpu, *i, weights) for i in inputs]
    }
    if stock is not None:
        calls["torch._grouped_mm"] = [partial(torch_grouped, i, weights) for i in inputs]
        for name in STOCK:
            if name != "batched_mm" or tokens <= MOST_GATHERED:
                calls[name] = [partial(stock.run, name, i) for i in inputs]
    if vllm is not None:
        config = vllm.tune(f"{shape.dtype} {shape.width} T={tokens}", inputs, weights)
        calls["vLLM"] = [vllm.call(i, weights, config) for i in inputs]
    hidden_TD, ids_TK, gates_TK = (tensor[:EXACT_TOKENS] for tensor in inputs[0])
    exact = experts_reference(hidden_TD.double(), ids_TK, gates_TK, weights)
    errors = {}
    for name, group in calls.items():
        got = group[0]()[: len(exact)].double()
        errors[name] = float((got - exact).norm() / exact.norm())
    return line(shape, tokens, "k=8", inputs, timed(calls), errors)


def measure_rules(shape: Shape, tokens: int, weights: ExpertWeights) -> list[Line]:
    """leanmoe under plans, side by side."""
    drawn = {name: draw_all(shape, tokens, rule) for name, rule in RULES.items()}
    calls = {
        name: [partial(experts_gpu, *i, weights) for i in group] for name, group in drawn.items()
    }
    found = timed(calls)
    return [line(shape, tokens, name, drawn[name], {"leanmoe": found[name]}, {}) for name in RULES]


def line(
    shape: Shape,
    tokens: int,
    rule: str,
    inputs: Sequence[Inputs],
    times: dict[str, list[float]],
    errors: dict[str, float],
) -> Line:
    """What a point's times come to."""
    used = [ids_TK[ids_TK < shape.experts] for _, ids_TK, _ in inputs]
    return Line(
        f"{shape.experts} x {shape.hidden} x {shape.width} {shape.dtype}",
        tokens,
        rule,
        sum(ids.unique().numel() for ids in used) / len(used),
        sum(len(ids) for ids in used) / len(used),
        {name: round(median(took), 2) for name, took in times.items()},
        {
            name: (round((q := quantiles(took, n=4))[0], 2), round(q[2], 2))
            for name, took in times.items()
        },
        {name: float(f"{error:.2e}") for name, error in errors.items()},
    )


def measure_routes() -> list[dict[str, Any]]:
    """Routing 256 experts by router, rule and tokens: microseconds, and the share of tokens that
    get the reference's experts."""
    found = []
    for router_name, router in ROUTERS.items():
        bias_E = torch.randn(256, device=DEVICE) * 0.1 if router.ranking_bias else None
        for rule_name, rule in ROUTE_RULES.items():
            entry: dict[str, Any] = {"router": router_name, "rule": rule_name}
            entry |= {"microseconds": {}, "as_reference": {}}
            for tokens in ROUTE_TOKENS:
                logits = [torch.randn(tokens, 256, device=DEVICE) for _ in range(8)]
                padding_T = torch.zeros(tokens, dtype=torch.bool, device=DEVICE)
                calls = [partial(route_gpu, x, router, 8, rule, bias_E, padding_T) for x in logits]
                took = timed({"route": calls})["route"]
                entry["microseconds"][str(tokens)] = round(median(took), 2)
                got, want = calls[0](), route(logits[0], router, 8, rule, bias_E, padding_T)
                is_same_T = (got.ids_TK.sort()[0] == want.ids_BTK.sort()[0]).all(-1)
                entry["as_reference"][str(tokens)] = round(float(is_same_T.float().mean()), 4)
            found.append(entry)
    return found


def dense_rate() -> float:
    """FLOP/s of a bf16 product of two 8192 x 8192 matrices."""
    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    took = timed({"dense": [lambda: a @ b] * 2})["dense"]
    return 2 * 8192**3 / (median(took) * 1e-6)


@triton.jit  # type: ignore[untyped-decorator]
def _read(x_ptr: Any, out_ptr: Any, BLOCK: tl.constexpr, STEPS: tl.constexpr) -> None:
    """Reads `STEPS` blocks of numbers; what it writes is there so that it must read."""
    start, n = tl.program_id(0).to(tl.int64) * STEPS, tl.arange(0, BLOCK)
    found = tl.zeros((BLOCK,), dtype=tl.int32)
    for step in range(STEPS):
        found ^= tl.load(x_ptr + (start + step) * BLOCK + n, eviction_policy="evict_first")
    tl.store(out_ptr + n, found, mask=found == -1)


def read_rate() -> float:
    """Bytes a second of reading 8 GiB and doing nothing with them, at the best block size."""
    numbers = torch.zeros(2**31, dtype=torch.int32, device=DEVICE)
    calls = {}
    for block, steps, warps in product((1024, 4096), (4, 16), (4, 8)):
        grid = (len(numbers) // (block * steps),)
        run = partial(_read[grid], numbers, numbers, BLOCK=block, STEPS=steps, num_warps=warps)
        calls[f"{block} {steps} {warps}"] = [run]
    return numbers.nbytes / (min(median(took) for took in timed(calls).values()) * 1e-6)


def known_bandwidth(gpu: str) -> float:
    """Bytes a second of a GPU by its name."""
    found = [rate for part, rate in BANDWIDTHS.items() if part in gpu]
    if not found:
        raise SystemExit(f"the bandwidth of {gpu} is not known here: give --bandwidth")
    return found[0]


def bytes_of(shape: Shape) -> float:
    """Of one expert's weights."""
    dtype: torch.dtype = getattr(torch, shape.dtype)
    return 3.0 * shape.hidden * shape.width * dtype.itemsize


def table(lines: Sequence[Line], shapes: dict[str, Shape], bandwidth: float, dense: float) -> str:
    """What a reader wants to see, in plain text."""
    rows = []
    for entry in lines:
        shape = shapes[entry.shape]
        took = entry.microseconds["leanmoe"] * 1e-6
        share = entry.distinct * bytes_of(shape) / took / bandwidth
        rate = entry.rows * 6 * shape.hidden * shape.width / took / dense  # fp8, too: of bf16's
        peers = {n: t for n, t in entry.microseconds.items() if n != "leanmoe"}
        others = ", ".join(f"{n} {t / took / 1e6:.2f}x" for n, t in peers.items())
        rows.append(
            f"{entry.shape:34s} T={entry.tokens:<5d} {entry.rule:13s} D={entry.distinct:6.1f} "
            f"{took * 1e6:9.1f} us  memory {share:5.1%}  dense {rate:5.1%}  {others}"
        )
    return "\n".join(rows)


def plan_table(rules: Sequence[Line]) -> str:
    """Plans beside the full model: the share of the time that distinct experts or rows promise."""
    full = {(entry.shape, entry.tokens): entry for entry in rules if entry.rule == "k=8"}
    rows = []
    for entry in rules:
        whole = full[entry.shape, entry.tokens]
        took, before = entry.microseconds["leanmoe"], whole.microseconds["leanmoe"]
        promised, by_rows = entry.distinct / whole.distinct, entry.rows / whole.rows
        rows.append(
            f"{entry.shape:34s} T={entry.tokens:<5d} {entry.rule:13s} D={entry.distinct:6.1f} "
            f"{took:9.1f} us  of the ideal by experts {promised * before / took:6.1%}, "
            f"by rows {by_rows * before / took:6.1%}"
        )
    return "\n".join(rows)


def show_machine(result: dict[str, Any]) -> None:
    """What the GPU reaches at best, and the times of routing."""
    read, dense = result["read_rate"], result["dense_flops"]
    share = read / result["bandwidth"]
    print(f"\nreading alone {read / 1e12:.3f} TB/s, {share:.1%} of the datasheet's")
    print(f"dense {dense / 1e12:.0f} TFLOP/s\n\nroutes, microseconds at {ROUTE_TOKENS} tokens")
    for entry in result["routes"]:
        least = min(entry["as_reference"].values())
        times = " ".join(map(str, entry["microseconds"].values()))
        print(f"{entry['router']:12s} {entry['rule']:24s} {times}  as the reference {least:.1%}")


def arguments_of() -> argparse.Namespace:
    """The command line."""
    parser = parser_of(__doc__)
    parser.add_argument("--bandwidth", type=float, help="of the GPU, bytes/s; known for H100, H200")
    parser.add_argument("--vllm", help="'installed', or a folder with vLLM in it; left out without")
    parser.add_argument("--shapes", default=",".join(NAMES), help="comma separated")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no point after so long")
    arguments = parser.parse_args()
    if unknown := set(arguments.shapes.split(",")) - set(NAMES):
        parser.error(f"--shapes has {unknown.pop()}: it must be of {', '.join(NAMES)}")
    return arguments


def main() -> None:
    """Measures everything, writes JSON, prints tables."""
    arguments = arguments_of()
    chosen = [NAMES[name] for name in arguments.shapes.split(",")]
    points = [(shape, sizes) for shape, sizes in POINTS if shape in chosen]
    started, vllm = time.monotonic(), None
    if arguments.vllm:
        vllm = Vllm(None if arguments.vllm == "installed" else Path(arguments.vllm))
        vllm.compile([(shape, tokens) for shape, sizes in points for tokens in sizes])
        print(f"vLLM {vllm.version} ready after {time.monotonic() - started:.0f} s", flush=True)
    where = collect(seed=0)
    bandwidth = arguments.bandwidth or known_bandwidth(where.hardware)
    dense, read = dense_rate(), read_rate()
    result: dict[str, Any] = {
        "bandwidth": bandwidth,
        "dense_flops": dense,
        "read_rate": read,
        "routes": measure_routes(),
    }
    lines: list[Line] = []
    rules: list[Line] = []
    configs: dict[str, Any] = {}
    shapes = {}
    for shape, sizes in points:
        torch.cuda.empty_cache()
        weights = random_weights(shape, DEVICE)
        stock = None if "float8" in shape.dtype else Stock(weights, shape.slots)
        for tokens in sizes:
            if time.monotonic() - started > arguments.seconds:
                print(f"out of time before {shape} at {tokens} tokens", flush=True)
                break
            lines.append(measure(shape, tokens, weights, stock, vllm))
            shapes[lines[-1].shape] = shape
            used = asdict(config_for(weights, tokens, shape.slots))
            configs[f"{lines[-1].shape} T={tokens}"] = used
            if shape in (V3, QWEN) and tokens >= 8:
                rules += measure_rules(shape, tokens, weights)
            print(table(lines[-1:], shapes, bandwidth, dense), flush=True)
        del weights, stock
    result |= {
        "lines": [asdict(entry) for entry in lines],
        "rules": [asdict(entry) for entry in rules],
        "configs": configs,
        "vllm": None if vllm is None else {"version": vllm.version, "tiles": vllm.chosen},
    }
    print(write(file_of(arguments.output, "experts-gpu", where), where, "measured", result))
    show_machine(result)
    print("\nunder plans")
    print(plan_table(rules))
    print("\nagainst peers: how much longer they take")
    print(table(lines, shapes, bandwidth, dense))


if __name__ == "__main__":
    main()
