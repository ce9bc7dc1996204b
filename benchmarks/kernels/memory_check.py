"""Does any GPU kernel touch memory that is not its own, or race? Every kernel once, small, ragged.

    compute-sanitizer --tool memcheck --error-exitcode 1 python -m benchmarks.kernels.memory_check
    compute-sanitizer --tool racecheck --error-exitcode 1 python -m benchmarks.kernels.memory_check

The sanitizer finds the faults; what comes out is compared with the references besides.
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import replace

import torch

from leanmoe.kernels import ExpertWeights, experts_gpu, experts_reference, route_gpu
from leanmoe.kernels.rule_words import DeviceRules, TokenRules
from leanmoe.kernels.triton.config import ExpertsConfig, Tile
from leanmoe.kernels.triton.tune_tiles import random_call, random_weights
from leanmoe.kernels.triton.tuned_tiles import Shape
from leanmoe.models.routers import Router
from leanmoe.plan import Rule
from leanmoe.plan.placement import Placement
from leanmoe.routing import BatchScope, RuleTable, route, route_rows

SHAPES = (
    Shape(12, 200, 72, 3, "bfloat16"),
    Shape(12, 200, 72, 3, "bfloat16", is_transposed=True),
    Shape(6, 256, 384, 2, "float8_e4m3fn"),
)
FIRST, SECOND = Tile(32, 64, 4, 3), Tile(32, 64, 4, 3)
FP8_FIRST, FP8_SECOND = Tile(128, 128, 8, 3), Tile(64, 128, 4, 3)
CONFIGS = (
    (1, ExpertsConfig(16, 0, True)),
    (3, ExpertsConfig(16, 0, True, fused_sum=True)),
    (13, ExpertsConfig(16, 0, True)),
    (37, ExpertsConfig(16, 0, False)),
    (150, ExpertsConfig(64, 16, False)),
)
PIECES = ((150, ExpertsConfig(16, 32, False, subblocks=2)),)
"""Blocks in pieces, which fp8 weights have not."""
FP8_CONFIGS = (
    (3, ExpertsConfig(16, 0, True, fp8_terms=2)),
    (37, ExpertsConfig(16, 0, False, fp8_terms=2)),
    (150, ExpertsConfig(64, 16, False, float16_act=True)),
)
"""Activations as the sum of two fp8 numbers, or float16 between the products."""
RULES: tuple[Rule | RuleTable, ...] = (
    Rule(),
    Rule(top_k=4),
    Rule(threshold=0.4),
    Rule(top_p=0.7),
    Rule(guaranteed=3),
    Rule(guaranteed=2, budget=20),
    Rule(experts=tuple(range(40)), budget=20),
    Rule(budget_per_rank=8),
    Rule(guaranteed=3, budget=20, budget_per_rank=8),
    RuleTable.of(6, [(Rule(top_k=4), Rule(top_k=0))]),
    RuleTable.of(6, [(Rule(guaranteed=2), Rule(top_k=2)), (Rule(threshold=0.4), None)]),
    RuleTable.of(6, [(Rule(budget=20, experts=tuple(range(40))), None)]),
    RuleTable.of(6, [(Rule(guaranteed=3, budget_per_rank=8, top_p=0.7), Rule(top_k=1))]),
)
PLACEMENT = Placement.linear(64, 4)
ROUTERS = (
    Router(normalise=True),
    Router("sigmoid", "bias", True, 1e-20, 2.5, 8, 4, "top2_sum", False),
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Without a GPU, Triton's interpreter (TRITON_INTERPRET=1) goes through the same calls."""
WORST = {"bfloat16": 1e-2, "float8_e4m3fn": 5e-2}
"""Relative error that is still rounding."""


def check_experts(shape: Shape, weights: ExpertWeights, tokens: int, chosen: ExpertsConfig) -> None:
    """One call, some of its slots skipped, against the reference in float64."""
    is_fp8 = weights.gate_up_scale is not None
    first, second = (FP8_FIRST, FP8_SECOND) if is_fp8 else (FIRST, SECOND)
    if chosen.fused_sum:
        second = Tile(8, 128, 4, 1)
    hidden_TD, ids_TK, gates_TK = random_call(shape, tokens, 0, DEVICE)
    ids_TK[::4, -1] = shape.experts  # skipped
    config = replace(chosen, gate_up=first, down=second)
    got = experts_gpu(hidden_TD, ids_TK, gates_TK, weights, config=config).double()
    want = experts_reference(hidden_TD.double(), ids_TK, gates_TK, weights)
    error = float((got - want).norm() / want.norm())
    kind = (
        "joined"
        if chosen.fused_sum
        else "direct"
        if chosen.is_direct
        else f"{chosen.BLOCK_M} + {chosen.TAIL_M} rows"
    )
    print(f"experts {shape} T={tokens} {kind}: relative error {error:.1e}", flush=True)
    if error > WORST[shape.dtype]:
        raise SystemExit(f"experts are wrong: {error:.1e} is more than {WORST[shape.dtype]:.0e}")


def check_route(router: Router, rule: Rule | RuleTable, tokens: int) -> None:
    """One call with padding rows against the reference; under a table every row has its tokens."""
    generator = torch.Generator(DEVICE).manual_seed(tokens)
    logits_TE = torch.randn(tokens, 64, generator=generator, device=DEVICE)
    bias_E = torch.linspace(-0.1, 0.1, 64, device=DEVICE) if router.ranking_bias else None
    padding_T = torch.arange(tokens, device=DEVICE) % 5 == 4
    rest, scope = (bias_E, padding_T), BatchScope(PLACEMENT)
    if isinstance(rule, RuleTable):
        rows_T = torch.arange(tokens, device=DEVICE) % len(rule.rows)
        rules = DeviceRules([rule], router, 6, 64, DEVICE, ranks=PLACEMENT.ranks)
        got = route_gpu(logits_TE, router, 6, TokenRules(rules, rows_T), *rest, PLACEMENT)
        want = route_rows(logits_TE, router, 6, rule, rows_T, *rest, scope)
    else:
        got = route_gpu(logits_TE, router, 6, rule, *rest, PLACEMENT)
        want = route(logits_TE, router, 6, rule, *rest, scope)
    # Some families leave their own top-k unsorted.
    agree = float((got.ids_TK.sort()[0] == want.ids_BTK.sort()[0]).float().mean())
    print(f"route {router.scoring} {rule} T={tokens}: {agree:.1%} of ids agree", flush=True)
    if agree < 0.99:
        raise SystemExit(f"routing is wrong: {agree:.1%} of ids agree")


def main() -> None:
    """Everything once."""
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    for shape in SHAPES:
        weights = random_weights(shape, DEVICE)
        for tokens, chosen in CONFIGS + (PIECES if weights.gate_up_scale is None else FP8_CONFIGS):
            check_experts(shape, weights, tokens, chosen)
    for router, rule, tokens in itertools.product(ROUTERS, RULES, (1, 37, 300)):
        check_route(router, rule, tokens)


if __name__ == "__main__":
    main()
