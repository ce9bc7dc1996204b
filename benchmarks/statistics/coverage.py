"""How often a plan that truly loses just the margin is accepted, simulated with tune's tests.

Each trial draws held-out text anew and asks the project's own functions. Accepting is the error,
and 5% of trials is what 95% confidence allows. Rows say what a document is like:

- independent: lengths over three orders of magnitude, documents that differ in how they are harmed;
- clusters: 1 to 9 documents a source, an intraclass correlation of 0.3 in the harm;
- rare harm: all of it in 2% of the documents;
- three loads: a plan for each, in one fixed sequence; correlated 0.95 and 0;
- four kinds: independent texts, the plan at the margin on one and without loss on the others;
- batch draws: three, with harm that a draw shares over all documents;
- three margins: a sequence for each along one order of plans, of which one loses just each margin;
  the claim of the middle level, or of any; correlated 0.95 and 0.

Letters: U documents, Z batch draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from benchmarks.common.results import collect, file_of, parser_of, write
from leanmoe.stats import paired
from leanmoe.stats.losses import Counts, Floats

MARGIN = 0.005
MARGINS = (0.002, 0.005, 0.01)
LOSS = 3.3
"""The full model's, nats a token; tokens differ by 0.3 nats under a plan."""
Trial = Callable[[np.random.Generator, int], bool]


def accepts(
    change: Floats, base_U: Floats, units_U: Counts | None = None, margin: float = MARGIN
) -> bool:
    """Whether the test of `tune` accepts a plan with these changes, at the margin."""
    return paired.ratio_of_sums(change, base_U, units_U=units_U).upper_bound <= margin


def _lengths(draw: np.random.Generator, count: int, spread: float = 1.5) -> Floats:
    tokens_U: Floats = np.maximum(np.exp(spread * draw.standard_normal(count)) * 300, 16)
    return tokens_U


def independent(draw: np.random.Generator, count: int) -> bool:
    """Documents that are sources of their own."""
    tokens_U = _lengths(draw, count)
    harm_U = MARGIN * LOSS * (1 + 0.6 * draw.standard_normal(count))
    noise_U = draw.normal(0, 0.3, count) / np.sqrt(tokens_U)
    return accepts((harm_U + noise_U) * tokens_U, LOSS * tokens_U)


def _clustered(draw: np.random.Generator, count: int) -> tuple[Floats, Floats, Counts]:
    sizes = draw.integers(1, 10, count)
    source_U = np.repeat(np.arange(count), sizes)
    tokens_U = _lengths(draw, len(source_U), 0.7)
    shared_U = math.sqrt(0.3) * draw.standard_normal(count)[source_U]
    harm_U = MARGIN * (1 + shared_U + math.sqrt(0.7) * draw.standard_normal(len(source_U)))
    return harm_U * LOSS * tokens_U, LOSS * tokens_U, source_U


def clusters(draw: np.random.Generator, count: int) -> bool:
    """Documents summed by source."""
    return accepts(*_clustered(draw, count))


def clusters_ignored(draw: np.random.Generator, count: int) -> bool:
    """The same as if each document stood for itself."""
    change_U, base_U, _ = _clustered(draw, count)
    return accepts(change_U, base_U)


def rare_harm(draw: np.random.Generator, count: int) -> bool:
    """All harm in one document of fifty."""
    harm_U = (draw.random(count) < 0.02) * MARGIN / 0.02
    return accepts(harm_U + draw.normal(0, 0.002, count), np.ones(count))


def _three_loads(correlation: float, in_sequence: bool) -> Trial:
    def trial(draw: np.random.Generator, count: int) -> bool:
        shared_U = math.sqrt(correlation) * draw.standard_normal(count)
        own = math.sqrt(1 - correlation)
        loads = [MARGIN + 0.01 * (shared_U + own * draw.standard_normal(count)) for _ in range(3)]
        if in_sequence:
            return bool(paired.fixed_sequence(loads, lambda each: accepts(each, np.ones(count))))
        return any(accepts(each, np.ones(count)) for each in loads)

    return trial


def _three_margins(correlation: float, counted: tuple[float, ...]) -> Trial:
    """Whether a plan that loses just a counted margin is accepted within it."""

    def trial(draw: np.random.Generator, count: int) -> bool:
        shared_U = math.sqrt(correlation) * draw.standard_normal(count)
        own = math.sqrt(1 - correlation)
        noise = [0.004 * (shared_U + own * draw.standard_normal(count)) for _ in MARGINS]
        plans = [loss + noise_U for loss, noise_U in zip(MARGINS, noise, strict=True)]

        def passes(margin: float) -> int:
            sequence = paired.fixed_sequence(
                range(len(plans)), lambda n: accepts(plans[n], np.ones(count), margin=margin)
            )
            return len(sequence)

        return any(passes(margin) > MARGINS.index(margin) for margin in counted)

    return trial


def four_kinds(draw: np.random.Generator, count: int) -> bool:
    """Accepted only where each kind is within the margin."""
    losses = (MARGIN, 0.0, 0.0, 0.0)
    return all(accepts(loss + draw.normal(0, 0.01, count), np.ones(count)) for loss in losses)


def batch_draws(draw: np.random.Generator, count: int) -> bool:
    """Three draws, each with harm that all documents share."""
    shared = draw.normal(0, 0.002, (3, 1))
    return accepts(MARGIN + shared + draw.normal(0, 0.01, count), np.ones(count))


ROWS: tuple[tuple[str, Trial, tuple[int, ...]], ...] = (
    ("independent", independent, (20, 40, 112)),
    ("clusters, by source", clusters, (40, 80)),
    ("clusters, by document", clusters_ignored, (40,)),
    ("rare harm", rare_harm, (112, 149, 200)),
    ("three loads in one sequence, correlation 0.95", _three_loads(0.95, True), (60,)),
    ("three loads in one sequence, correlation 0", _three_loads(0.0, True), (60,)),
    ("three loads apart, correlation 0.95", _three_loads(0.95, False), (60,)),
    ("three loads apart, correlation 0", _three_loads(0.0, False), (60,)),
    ("four kinds", four_kinds, (60,)),
    ("three batch draws", batch_draws, (60,)),
    ("three margins, one level, correlation 0", _three_margins(0.0, MARGINS[1:2]), (60,)),
    ("three margins, any level, correlation 0.95", _three_margins(0.95, MARGINS), (60,)),
    ("three margins, any level, correlation 0", _three_margins(0.0, MARGINS), (60,)),
)


def main() -> None:
    """Simulates every row, prints it, and writes the results file."""
    parser = parser_of(__doc__)
    parser.add_argument("--trials", type=int, default=2000, help="trials of each row")
    parser.add_argument("--replicates", type=int, default=1000, help="of the bootstrap; tune: 4000")
    asked = parser.parse_args()
    paired.REPLICATES = asked.replicates
    rows = []
    for seed, (name, trial, sizes) in enumerate(ROWS):
        for size in sizes:
            draw = np.random.default_rng([seed, size])
            accepted = sum(trial(draw, size) for _ in range(asked.trials)) / asked.trials
            error = math.sqrt(accepted * (1 - accepted) / asked.trials)
            rows.append({"text": name, "sources": size, "accepted": accepted, "error": error})
            print(f"{name:50} {size:4} {100 * accepted:5.1f}% ± {100 * error:.1f}", flush=True)
    made = collect(0)
    content = {
        "margin": MARGIN,
        "trials": asked.trials,
        "replicates": asked.replicates,
        "rows": rows,
    }
    print(write(file_of(asked.output, "coverage", made), made, "simulated", content))


if __name__ == "__main__":
    main()
