"""The paper's claims beside what was found: one table of words, and the figures that fill it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple, dataclass

from leanmoe.core.intervals import LossChange
from leanmoe.predict.experts.spread import ranks_touched
from leanmoe.results.study import Analysis, Banded, Claim, StudiedQuality, Table9, V2Lite
from leanmoe.study import paper
from leanmoe.study.table_9 import WITHIN

CONFIRMED, PARTLY, REFUTED = "confirmed", "partly", "not confirmed"
LEAST_RISE = 2.0
"""Points of percent that a curve must rise again to be called a U."""
NOTHING = 0.005
"""The relative increase in loss up to which a setting costs almost nothing."""
BEST_SHAPE = "(6, 8, 8, 61), the paper's best"


@dataclass(frozen=True)
class _Words:
    """A claim's words, with the names of figures in braces."""

    claim: str
    paper: str
    ours: str
    why: str


_A_TENTH = _Words(
    "Two of eight experts fewer a token gain DeepSeek-V3 a tenth",
    "k = 6: {cited:+.1f}% at concurrency 32, {low:+.1f}% to {high:+.1f}% elsewhere",
    "k = 6: {ours:+.1f}% at 32; most {most:+.1f}% at {most_at}",
    "While memory-bound the gain follows the distinct experts, which fall most at 8 to 32 "
    "requests; not only at 32.",
)
_EVERY_LOAD = _Words(
    "The gain of fewer experts at every load, as Table 9 has it",
    "k = 4: {cited}% at {loads}",
    "{within} of {counted} ratios of k = 6 and 4 within {points:g} points; k = 4 off by up to "
    "{off:.0f}",
    "With k = 4 the paper's steps shorten by less than reading the fewer experts of independent "
    "tokens saves at the GPU's full bandwidth: {shortest}. Its text or engine must have hidden "
    "part of it; which, its tables do not say.",
)
_U_ON_V2_LITE = _Words(
    "On V2-Lite the gain falls with load and rises again",
    "{cited}",
    "{ours}",
    "Few experts active at first, all of them in the middle, products at the end. The fall is "
    "there; the first gains and the rise are lower: constants for the A800 are carried over from "
    "the H200.",
)
_UNIFORM_K = _Words(
    "A uniform lower k is how to get it",
    "{cited:+.1f}% at 32 with k = 6",
    "{banded:+.1f}% at 32 with {name}; {uniform:+.1f}% with k = 6",
    "Sharing experts within a step activates fewer of them for the same experts a token. "
    "DeepSeek-V3's quality under it has not been measured by us.",
)
_BYTES = _Words(
    "Bytes and products of an expert of DeepSeek-V3",
    "width {wrong}",
    "width {right}: {times:.0f} times fewer",
    "{wrong} is the width of the first three layers, which have no experts.",
)
_MEMORY_BOUND = _Words(
    "Fine-grained experts stay bound by memory up to higher loads",
    "argued from arithmetic intensity",
    "8 of 256: compute-bound from {fine:,} tokens in a step; 2 of 8 (Mixtral's): from {coarse:,}",
    "An active expert has k/E of the step's tokens. It is that share, not the width of an expert, "
    "that decides.",
)
_VOLUME = _Words(
    "Expert parallelism sends at most 2kLd a token, tensor parallelism at least 2(n-1)Ld",
    "bounds",
    "a token goes once to each GPU that holds any of its experts; 8 of 256 on 8 GPUs are on "
    "{touched:.1f} of them",
    "The bounds hold; real volume is lower, and at decode the time is latency: see "
    "docs/results/prediction.md.",
)
_TWO_FEWER = _Words(
    "Two experts fewer a token cost almost nothing",
    "DeepSeek-V3, six tasks: 72.9 for 73.0",
    "reference model, next-token loss {six}; {kept} when the experts that remain keep their "
    "weights",
    "Loss on text sees what multiple choice does not; a small model is not DeepSeek-V3. Weights "
    "that are not blown up cost several times less.",
)
_EARLY_LAYERS = _Words(
    "Fewer experts in early layers are better than all",
    "(6, 8, 8, 61): 73.3 for 73.0",
    "reference model, {best}",
    "A difference of 0.3 points on six tasks is within what documents differ.",
)
_LEAST_USED = _Words(
    "Experts that are used least can be pruned",
    "activation and soft counts",
    "48 of 64: by count {counted}, at random {chance}, by routing weight and output {reap}",
    "How often an expert is used says little about how much its output does.",
)


def speed_claims(nine: Table9, lite: V2Lite, banded: Banded, analysis: Analysis) -> list[Claim]:
    """The claims on throughput and on bytes and products."""
    starts = analysis.compute_bound_from
    later = starts["fine"] > starts["coarse"]
    width = {"wrong": paper.WRONG_WIDTH, "right": paper.RIGHT_WIDTH}
    return [
        _a_tenth(nine),
        _every_load(nine),
        _u_on_v2_lite(lite),
        _uniform_k(nine, banded),
        _claim(_BYTES, REFUTED, **width, times=analysis.too_much),
        _claim(_MEMORY_BOUND, CONFIRMED if later else REFUTED, **starts),
        _claim(_VOLUME, CONFIRMED, touched=ranks_touched(256, 8, 8, 1, 1)),
    ]


def _claim(words: _Words, verdict: str, **figures: object) -> Claim:
    claim, cited, ours, why = (part.format(**figures) for part in astuple(words))
    return Claim(claim, cited, ours, verdict, why)


def _a_tenth(nine: Table9) -> Claim:
    at_32 = next(row for row in nine.rows if row.concurrency == 32)
    best = max(nine.rows, key=lambda row: row.gain["6"])
    elsewhere = [row.paper_gain["6"] for row in nine.rows if row is not at_32]
    return _claim(
        _A_TENTH,
        CONFIRMED if abs(at_32.off["6"]) <= WITHIN else PARTLY,
        cited=at_32.paper_gain["6"],
        low=min(elsewhere),
        high=max(elsewhere),
        ours=at_32.gain["6"],
        most=best.gain["6"],
        most_at=best.concurrency,
    )


def _every_load(nine: Table9) -> Claim:
    less = [row for row in nine.rows if row.saved_ms["paper"] < row.saved_ms["reading"]]
    claim = _claim(
        _EVERY_LOAD,
        CONFIRMED if nine.within == nine.counted else PARTLY,
        cited=", ".join(f"{row.paper_gain['4']:+.1f}" for row in nine.rows),
        loads=", ".join(str(row.concurrency) for row in nine.rows),
        within=nine.within,
        counted=nine.counted,
        points=WITHIN,
        off=max(abs(row.off["4"]) for row in nine.rows),
        shortest=", ".join(
            f"{row.saved_ms['paper']:.1f} of {row.saved_ms['reading']:.1f} ms at {row.concurrency}"
            for row in less
        ),
    )
    return claim if less else Claim(claim.claim, claim.paper, claim.ours, claim.verdict, "")


def _u_on_v2_lite(lite: V2Lite) -> Claim:
    gains = [row.gain["k=4"] for row in lite.rows]
    lowest = gains.index(min(gains))
    is_u = 0 < lowest < len(gains) - 1 and gains[-1] - gains[lowest] >= LEAST_RISE
    ours = {row.concurrency: row.gain["k=4"] for row in lite.rows}
    cited, ours_shown = (
        ", ".join(f"{gain:+.1f}% at {load}" for load, gain in each.items())
        for each in (paper.V2_LITE_GAINS, ours)
    )
    return _claim(_U_ON_V2_LITE, CONFIRMED if is_u else PARTLY, cited=cited, ours=ours_shown)


def _uniform_k(nine: Table9, banded: Banded) -> Claim:
    at_32 = next(row for row in nine.rows if row.concurrency == 32)
    name = next(name for name in banded.gains if name.startswith("banded"))
    gain = banded.gains[name][banded.concurrency.index(32)]
    return _claim(
        _UNIFORM_K,
        REFUTED if gain > at_32.gain["6"] + WITHIN else PARTLY,
        cited=at_32.paper_gain["6"],
        banded=gain,
        name=name,
        uniform=at_32.gain["6"],
    )


def quality_claims(quality: StudiedQuality) -> Iterator[Claim]:
    """The claims on quality, for which both settings were measured."""
    measured = {(row.group, row.name, round(row.share, 6)): row.increase for row in quality.rows}
    six, kept = (measured.get((group, "k=6", 1.0)) for group in ("k", "k, weights kept"))
    if six and kept:
        verdict = REFUTED if six.low > NOTHING else PARTLY
        yield _claim(_TWO_FEWER, verdict, six=_shown(six), kept=_shown(kept))
    if best := measured.get(("shape", BEST_SHAPE, 1.0)):
        yield _claim(_EARLY_LAYERS, REFUTED if best.low > 0 else PARTLY, best=_shown(best))
    criteria = ("random", "activate-count", "reap")
    chance, counted, reap = (measured.get(("pruning", name, 0.75)) for name in criteria)
    if chance and counted and reap:
        verdict = CONFIRMED if counted.high < chance.low else REFUTED
        shown = {"chance": _shown(chance), "counted": _shown(counted), "reap": _shown(reap)}
        yield _claim(_LEAST_USED, verdict, **shown)


def _shown(increase: LossChange) -> str:
    ratio, low, high = (100 * each for each in (increase.ratio, increase.low, increase.high))
    return f"{ratio:+.1f}% [{low:.1f}, {high:.1f}]"
