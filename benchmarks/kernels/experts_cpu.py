"""How fast are a MoE layer's experts on this CPU: leanmoe against each of Transformers' own?

    python -m benchmarks.kernels.experts_cpu

Every implementation computes the same calls on the same weights in the same run, one after the
other in each round, in an order that changes from round to round, over six layers so that no
layer's weights wait in a near cache. Each is run twice in a row and timed the second time, so that
it finds the caches as its own decode loop would leave them and not as the one before it. Shown are
medians over rounds for one layer, and the median of the rounds' own ratios. Weights are random
(numbers that bf16 cannot hold, so float32 layers are measured as float32); the experts' popularity
is skewed as a router's is, and the distinct experts stand beside every time.

Shapes: T tokens, K slots a token, E experts, D hidden width, M expert width.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from statistics import median, quantiles
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

from benchmarks.common.results import collect, file_of, parser_of, write
from leanmoe.core.progress import bar
from leanmoe.kernels import ExpertWeights, choose_experts, experts_cpu

LAYERS, EXPERTS, SLOTS, HIDDEN, WIDTH = 6, 64, 8, 224, 48
TOKENS = (1, 2, 4, 8, 16, 32, 64, 256, 1024)
STOCK = ("eager", "batched_mm", "grouped_mm")
SLOW_SECONDS = 1.5
"""What has used this much time for one line of the table is not measured in further rounds."""
LEAST_ROUNDS = 3
POPULARITY_SPREAD = 1.0
"""Standard deviation of the experts' log popularity."""


@dataclass
class Timing:
    """One implementation on one call, microseconds a layer."""

    rounds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Over the rounds after the first, which warms up."""
        return median(self.rounds[1:] or self.rounds)


@dataclass(frozen=True)
class Line:
    """All implementations on the same tokens."""

    dtype: str
    tokens: int
    distinct: float
    microseconds: dict[str, float]
    least_microseconds: dict[str, float]
    rounds: dict[str, int]
    fastest_stock: str
    times_faster: float
    times_faster_quartiles: tuple[float, float]


@dataclass(frozen=True)
class Fit:
    """microseconds = fixed + distinct x per_expert + rows x per_row, over calls up to 64 tokens."""

    dtype: str
    fixed: float
    per_expert: float
    per_row: float
    calls: int
    mean_relative_error: float


def draw_ids(tokens: int, slots: int, experts: int, generator: torch.Generator) -> Tensor:
    """(T,K) distinct experts a token, some experts more popular than others."""
    popularity_E = torch.randn(experts, generator=generator) * POPULARITY_SPREAD
    gumbel_TE = -torch.rand(tokens, experts, generator=generator).log().neg().log()
    return (popularity_E + gumbel_TE).topk(slots, dim=-1).indices


def make_layers(dtype: torch.dtype) -> tuple[DeepseekV3Config, list[Any]]:
    """Transformers' own expert modules with random weights."""
    config = DeepseekV3Config(
        hidden_size=HIDDEN,
        moe_intermediate_size=WIDTH,
        n_routed_experts=EXPERTS,
        num_experts_per_tok=SLOTS,
        n_shared_experts=1,
    )
    layers = []
    for _ in range(LAYERS):
        experts = DeepseekV3MoE(config).experts
        for parameter in experts.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
        layers.append(experts.to(dtype).eval())
    return config, layers


Call = Callable[[], object]


def interleave(calls: dict[str, Call], rounds: int) -> dict[str, Timing]:
    """Times every call once a round; slow ones leave after a few."""
    timings = {name: Timing() for name in calls}
    spent = dict.fromkeys(calls, 0.0)
    order = random.Random(0)
    for number in range(rounds):
        for name, call in order.sample(list(calls.items()), len(calls)):
            if number > LEAST_ROUNDS and spent[name] > SLOW_SECONDS:
                continue
            call()
            started = time.perf_counter()
            call()
            seconds = time.perf_counter() - started
            spent[name] += seconds
            timings[name].rounds.append(seconds / LAYERS * 1e6)
    return timings


class Bench:
    """The layers of one dtype, in both libraries."""

    def __init__(self, dtype: torch.dtype, seed: int) -> None:
        torch.manual_seed(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = dtype
        self.name = str(dtype).removeprefix("torch.")
        self.config, self.layers = make_layers(dtype)
        self.weights = [
            ExpertWeights(layer.gate_up_proj.detach(), layer.down_proj.detach())
            for layer in self.layers
        ]
        for weights in self.weights:
            self.choice = choose_experts(weights, "cpu")

    def stock(
        self, implementation: str, hidden_TD: Tensor, ids: list[Tensor], gates: Tensor
    ) -> Call:
        """All layers by one of Transformers' implementations."""

        def call() -> None:
            self.config._experts_implementation = implementation
            for layer, ids_TK in zip(self.layers, ids, strict=True):
                layer(hidden_TD, ids_TK, gates)

        return call

    def ours(self, hidden_TD: Tensor, ids: list[Tensor], gates: Tensor) -> Call:
        """All layers by leanmoe."""

        def call() -> None:
            for weights, ids_TK in zip(self.weights, ids, strict=True):
                experts_cpu(hidden_TD, ids_TK, gates, weights)

        return call

    def inputs(self, tokens: int, slots: int = SLOTS) -> tuple[Tensor, list[Tensor], Tensor]:
        """Hidden states, the layers' ids, routing weights."""
        hidden_TD = torch.randn(tokens, HIDDEN, generator=self.generator).to(self.dtype)
        ids = [draw_ids(tokens, slots, EXPERTS, self.generator) for _ in range(LAYERS)]
        return hidden_TD, ids, torch.rand(tokens, slots, generator=self.generator).to(self.dtype)

    def line(self, tokens: int, rounds: int) -> Line:
        """Everything at one number of tokens."""
        hidden_TD, ids, gates = self.inputs(tokens)
        calls = {name: self.stock(name, hidden_TD, ids, gates) for name in STOCK}
        calls["leanmoe"] = self.ours(hidden_TD, ids, gates)
        for kept in (6, 4):  # skipped slots: the id E, as a plan writes them
            fewer = [torch.where(torch.arange(SLOTS) < kept, i, EXPERTS) for i in ids]
            calls[f"leanmoe k={kept}"] = self.ours(hidden_TD, fewer, gates)
        # As many rows on half of the experts.
        half = [i % (EXPERTS // 2) for i in ids]
        calls["leanmoe E/2"] = self.ours(hidden_TD, half, gates)
        timings = interleave(calls, rounds)
        fastest = min(STOCK, key=lambda name: timings[name].median)
        both = zip(timings[fastest].rounds[1:], timings["leanmoe"].rounds[1:], strict=False)
        ratios = [stock / own for stock, own in both]
        low, _, high = quantiles(ratios, n=4)
        return Line(
            self.name,
            tokens,
            sum(i.unique().numel() for i in ids) / LAYERS,
            {name: round(timing.median, 2) for name, timing in timings.items()},
            {name: round(min(timing.rounds), 2) for name, timing in timings.items()},
            {name: len(timing.rounds) for name, timing in timings.items()},
            fastest,
            round(median(ratios), 2),
            (round(low, 2), round(high, 2)),
        )

    def fit(self, rounds: int) -> Fit:
        """What a call costs by distinct experts and rows, from calls that vary both."""
        calls: dict[str, Call] = {}
        rows_and_experts = []
        for tokens in (1, 2, 4, 8, 16, 32, 64):
            hidden_TD, ids, gates = self.inputs(tokens)
            for kept in (8, 4, 2):
                for experts in (EXPERTS, EXPERTS // 4):
                    used = [
                        torch.where(torch.arange(SLOTS) < kept, i % experts, EXPERTS) for i in ids
                    ]
                    distinct = sum(u[u < EXPERTS].unique().numel() for u in used) / LAYERS
                    calls[f"{tokens} {kept} {experts}"] = self.ours(hidden_TD, used, gates)
                    rows_and_experts.append((1.0, distinct, float(tokens * kept)))
        timings = interleave(calls, rounds)
        times = np.array([timing.median for timing in timings.values()])
        factors = np.array(rows_and_experts)
        # Relative errors count, so that small calls matter as much as large ones.
        solution, *_ = np.linalg.lstsq(factors / times[:, None], np.ones(len(times)), rcond=None)
        error = np.abs(factors @ solution / times - 1).mean()
        fixed, per_expert, per_row = (round(float(value), 3) for value in solution)
        return Fit(self.name, fixed, per_expert, per_row, len(times), round(float(error), 3))

    def overhead(self) -> float:
        """Microseconds of a call that has nothing to compute."""
        hidden_TD, ids, gates = self.inputs(1)
        nothing = self.ours(hidden_TD, [torch.full_like(i, EXPERTS) for i in ids], gates)
        return round(interleave({"nothing": nothing}, 400)["nothing"].median, 2)


def table(lines: list[Line], fits: list[Fit], overheads: dict[str, float]) -> str:
    """What was measured, as text."""
    names = list(lines[0].microseconds)
    head = f"{'weights':<9}{'T':>5}{'distinct':>9}" + "".join(f"{n:>12}" for n in names)
    rows = [head + f"{'faster':>8}  quartiles"]
    for line in lines:
        times = "".join(f"{line.microseconds[n]:>12.0f}" for n in names)
        low, high = line.times_faster_quartiles
        rows.append(
            f"{line.dtype:<9}{line.tokens:>5}{line.distinct:>9.1f}{times}"
            f"{line.times_faster:>7.1f}x  {low:.1f}-{high:.1f} ({line.fastest_stock})"
        )
    for fit in fits:
        rows.append(
            f"{fit.dtype}: {fit.fixed:.1f} + {fit.per_expert:.2f} x distinct experts "
            f"+ {fit.per_row:.2f} x rows us a layer up to 64 tokens "
            f"(mean error {fit.mean_relative_error:.0%}); "
            f"{overheads[fit.dtype]:.1f} us a call with every slot skipped"
        )
    return "\n".join(rows)


def main() -> None:
    """Measures, writes the results file, prints the table."""
    parser = parser_of(__doc__)
    parser.add_argument("--rounds", type=int, default=25, help="rounds a line (default 25)")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)), help="tokens, with commas")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    tokens = [int(count) for count in options.tokens.split(",")]

    lines, fits, overheads, implementations = [], [], {}, {}
    load_before = os.getloadavg()
    with torch.inference_mode(), bar("experts", 2 * (len(tokens) + 1), "lines") as advance:
        for dtype in (torch.float32, torch.bfloat16):
            bench = Bench(dtype, options.seed)
            implementations[bench.name] = f"{bench.choice.name}: {bench.choice.reason}"
            overheads[bench.name] = bench.overhead()
            for count in tokens:
                lines.append(bench.line(count, options.rounds))
                advance(1)
            fits.append(bench.fit(options.rounds))
            advance(1)

    origin = collect(options.seed)
    result = {
        "leanmoe_benchmark": 1,
        "what": "experts of one layer on CPU, microseconds",
        "threads": torch.get_num_threads(),
        "load_average": {"before": load_before, "after": os.getloadavg()},
        "shape": {
            "layers": LAYERS,
            "experts": EXPERTS,
            "slots": SLOTS,
            "hidden": HIDDEN,
            "width": WIDTH,
        },
        "implementation": implementations,
        "lines": [asdict(line) for line in lines],
        "fit": [asdict(fit) for fit in fits],
        "overhead_microseconds": overheads,
    }
    path = write(file_of(options.output, "experts-cpu", origin), origin, "measured", result)
    print(f"{origin.hardware}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"Microseconds a layer; load average {load_before[0]:.1f} before the run. {path}\n")
    print(table(lines, fits, overheads))


if __name__ == "__main__":
    main()
