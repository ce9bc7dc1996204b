"""What does it cost to read each token's rule from a table, beside one rule that is compiled in?

    python -m benchmarks.kernels.rule_tables --device cuda

One layer's routing. Every token is under the same rule both times: as a constant of the launch, and
as a row of a table that has prompt rows and the model as trained, too. On a GPU both are captured
in graphs. They are timed in turn, round after round, in an order that changes. Shown are medians
over rounds, and the median of the rounds' differences with their middle half.

Shapes: T tokens, E experts.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from statistics import median, quantiles
from typing import Any

import torch

from benchmarks.common.results import collect, file_of, parser_of, write
from leanmoe.kernels.dispatch import route_ids
from leanmoe.kernels.rule_words import DeviceRules, TokenRules
from leanmoe.models.routers import Router
from leanmoe.plan import Rule
from leanmoe.routing import RuleTable

TOP_K, CALLS, ROUNDS = 8, 48, 25
"""Calls are those of one timing: as many as a model has layers."""
EXPERTS = {"cuda": (128, 256), "cpu": (64, 128)}
TOKENS = {"cuda": (1, 8, 32, 128, 512, 4096, 16384), "cpu": (1, 8, 32, 256)}
RULES = {
    "top_k=4": Rule(top_k=4),
    "threshold=0.3": Rule(threshold=0.3),
    "guaranteed=3": Rule(guaranteed=3),
    "guaranteed=3, budget=48": Rule(guaranteed=3, budget=48),
}
PROMPT = Rule(top_k=2)
Timed = Callable[[], float]
"""Times itself: microseconds a call."""


def timed(call: Callable[[], object], device: str) -> Timed:
    """The call, captured where there are graphs."""
    if device == "cuda":
        from leanmoe.kernels.triton.timing import Captured

        return Captured([call] * CALLS).time

    def run() -> float:
        began = time.perf_counter()
        for _ in range(CALLS):
            call()
        return (time.perf_counter() - began) / CALLS * 1e6

    return run


def both(experts: int, tokens: int, rule: Rule, device: str) -> tuple[Timed, Timed]:
    """One step under a rule that is a constant, and under the same as a row of a table."""
    generator = torch.Generator().manual_seed(tokens)
    logits_TE = torch.randn(tokens, experts, generator=generator).to(device)
    padding_T = torch.zeros(tokens, dtype=torch.bool, device=device)
    router = Router(normalise=True)
    table = RuleTable.of(TOP_K, [(rule, PROMPT)])
    rows_T = torch.ones(tokens, dtype=torch.int32, device=device)
    rows = TokenRules(DeviceRules([table], router, TOP_K, experts, device), rows_T)

    def call(rules: Rule | TokenRules) -> Callable[[], object]:
        step = (logits_TE, router, TOP_K, rules, None, padding_T)
        return lambda: route_ids(*step, skipped_id=-1)

    return timed(call(rule), device), timed(call(rows), device)


def compare(sides: tuple[Timed, Timed], rounds: int) -> dict[str, Any]:
    """Microseconds of either, and of what lies between them."""
    order, pairs = random.Random(0), []
    for number in range(rounds + 1):
        took = {side: sides[side]() for side in order.sample((0, 1), 2)}
        if number:  # the first round warms up
            pairs.append((took[0], took[1]))
    more = [table - constant for constant, table in pairs]
    low, _, high = quantiles(more, n=4)
    return {
        "constant_us": median(constant for constant, _ in pairs),
        "table_us": median(table for _, table in pairs),
        "more_us": median(more),
        "middle_half_us": [low, high],
    }


def main() -> None:
    """Times all shapes, writes JSON, prints a table."""
    parser = parser_of(__doc__)
    parser.add_argument("--device", choices=sorted(TOKENS), default="cpu")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    made, device = collect(seed=0), given.device
    rows = []
    for experts in EXPERTS[device]:
        for tokens in TOKENS[device]:
            for name, rule in RULES.items():
                sides = both(experts, tokens, rule, device)
                row = {"experts": experts, "tokens": tokens, "rule": name}
                rows.append({**row, **compare(sides, given.rounds)})
                print(
                    f"E={experts} T={tokens} {name:24s} {rows[-1]['constant_us']:9.2f} us, "
                    f"by a table {rows[-1]['table_us']:9.2f} us: {rows[-1]['more_us']:+.2f} us",
                    flush=True,
                )
    path = file_of(given.output, f"rule-tables-{device}", made)
    content = {"device": device, "rounds": given.rounds, "calls": CALLS, "rows": rows}
    print(write(path, made, "measured", content))


if __name__ == "__main__":
    main()
