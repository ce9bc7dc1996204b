"""How many experts does the most loaded rank of expert parallelism activate under each rule?

    python -m benchmarks.predict.most_loaded_rank

Counted, not timed, on drawn logits with a fixed seed: evenly, or with the skew of the reference
model's layers stretched to as many experts and shuffled (vllm.replay). One layer's shape is that
of Qwen3-30B-A3B: 128 experts, 8 a token. Experts are placed in blocks, as vLLM places them. Shown
are means over steps with a 95% interval, and the share of the full model's gate mass that the
experts that run carry: what a rule drops, which is not yet what it costs in quality.

Letters: B steps, T tokens of a step (drawn: of all of a layer's steps), E experts, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.common.results import collect, file_of, parser_of, write
from benchmarks.vllm.replay import ROUTINGS, Replay, reference_use
from leanmoe.core.progress import bar
from leanmoe.models.routers import Router
from leanmoe.plan import Rule
from leanmoe.plan.placement import Placement
from leanmoe.routing import BatchScope, count_distinct, count_distinct_by_rank, route, score

EXPERTS, TOP_K, BUDGET = 128, 8, 48
ROUTER = Router(normalise=True)
RULES: tuple[tuple[str, Callable[[int], Rule]], ...] = (
    ("k=8", lambda _ranks: Rule()),
    ("guaranteed=3", lambda _ranks: Rule(guaranteed=3)),
    (f"budget={BUDGET}", lambda _ranks: Rule(budget=BUDGET)),
    (f"budget_per_rank={BUDGET}/R", lambda ranks: Rule(budget_per_rank=BUDGET // ranks)),
)
"""The last has the same total as the one before it, in equal parts."""


def main() -> None:
    """Counts, writes JSON, prints a table for each kind of routing."""
    parser = parser_of(__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--steps", type=int, default=40, help="Of each layer.")
    parser.add_argument("--seed", type=int, default=0)
    settings = parser.parse_args()
    rows = []
    cells = [(kind, tokens) for kind in ROUTINGS for tokens in settings.tokens]
    with bar("steps routed", len(cells)) as advance:
        for kind, tokens in cells:
            logits_BTE = drawn(kind, settings.steps, tokens, settings.seed)
            rows += [
                {"routing": kind, "tokens": tokens, "ranks": ranks, "rule": name}
                | counted(logits_BTE, rule(ranks), ranks)
                for ranks in settings.ranks
                for name, rule in RULES
            ]
            advance(1)
    made = collect(settings.seed)
    path = file_of(settings.output, "most-loaded-rank", made)
    print(write(path, made, "measured", {"rows": rows}))
    show(rows, settings.ranks)


def drawn(kind: str, steps: int, tokens: int, seed: int) -> Tensor:
    """Logits (B,T,E): `steps` with the use of each of the reference model's layers."""
    use_LE = reference_use()
    replay = Replay(EXPERTS, steps * tokens, use_LE)
    wanted_TE = torch.empty(steps * tokens, EXPERTS)
    logits_LTE = [replay.logits(layer, wanted_TE) for layer in range(len(use_LE))]
    replay.draw(kind, seed)  # in place
    return torch.cat(logits_LTE).view(-1, tokens, EXPERTS)


def counted(logits_BTE: Tensor, rule: Rule, ranks: int) -> dict[str, float]:
    """What steps activate under a rule, on the most loaded rank and in all; the mass that runs."""
    placement = Placement.linear(EXPERTS, ranks)
    routing = route(logits_BTE, ROUTER, TOP_K, rule, scope=BatchScope(placement))
    most_B = count_distinct_by_rank(routing.ids_BTK, placement).amax(dim=-1).double()
    gates_BTE = torch.nn.functional.pad(score(logits_BTE, ROUTER).gates_BTE, (0, 1))
    ran_BT = gates_BTE.gather(-1, routing.ids_BTK).sum(dim=-1)
    full_BT = gates_BTE.topk(TOP_K, dim=-1)[0].sum(dim=-1)
    over_B = routing.over_budget_B
    return {
        "most_loaded": float(most_B.mean()),
        "interval": 1.96 * float(most_B.std()) / math.sqrt(len(most_B)),
        "distinct": float(count_distinct(routing.ids_BTK, EXPERTS).double().mean()),
        "mass": float((ran_BT / full_BT).mean()),
        "over_budget": 0.0 if over_B is None else float(over_B.double().mean()),
    }


def show(rows: list[dict[str, float]], all_ranks: list[int]) -> None:
    """Markdown: a line for each load and rule, a column for each number of ranks."""
    names = [f"R={ranks}" for ranks in all_ranks]
    print("| logits | tokens | rule | distinct | " + " | ".join(names) + " |")
    print("|" + "---|" * (4 + len(names)))
    keys = dict.fromkeys((row["routing"], row["tokens"], row["rule"]) for row in rows)
    for key in keys:
        found = [r for r in rows if (r["routing"], r["tokens"], r["rule"]) == key]
        cells = [
            f"{r['most_loaded']:.1f}±{r['interval']:.1f}, {r['mass']:.0%}"
            + (f" ({r['over_budget']:.0%} over)" if r["over_budget"] else "")
            for r in found
        ]
        distinct = " / ".join(dict.fromkeys(f"{r['distinct']:.0f}" for r in found))
        print(f"| {key[0]} | {key[1]} | {key[2]} | {distinct} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
