"""The paper's claims beside what was found: one table of words, and the figures that fill it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import astuple, dataclass

from leanmoe.core.intervals import LossChange
from leanmoe.predict.experts.spread import ranks_touched
from leanmoe.results.study import Analysis, Claim, StudiedQuality, StudyResults, Table9, V2Lite
from leanmoe.study import paper
from leanmoe.study.table_9 import WITHIN

CONFIRMED, PARTLY, REFUTED = "confirmed", "partly", "not confirmed"
UNTESTED = "not tested"
LEAST_RISE = 2.0
"""Points of percent that a curve must rise again to be called a U."""
NOTHING, SEVERE, LIMITED = 0.005, 0.05, 10.0
"""Relative increases in loss up to which a setting costs almost nothing, and from which much; the
percent up to which a gain is limited."""
BEST_SHAPE = "(6, 8, 8, 61), the paper's best"
AT = 32
"""The concurrency at which the paper's k = 6 gains a tenth."""


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
    "k = 6: {ours:+.1f}% at 32, {least:+.1f}% to {most:+.1f}% elsewhere",
    "The model agrees at 32, where the paper's point breaks the trend of its own table. A tenth is "
    "gained near that load, not at every load.",
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
_WIDTHS = _Words(
    "Widths of DeepSeek-V3's experts (Table 1)",
    "routed {right:,}, shared {wrong:,}",
    "{right:,} both",
    "The routed experts' is right. {wrong:,} is the width of the three dense layers: with it a "
    "token's experts would have {times:.1f} times their bytes.",
)
_MEMORY_BOUND = _Words(
    "Fine-grained experts stay bound by memory up to higher loads",
    "argued from arithmetic intensity",
    "8 of 256: compute-bound from {fine:,} tokens in a step; 2 of 8 (Mixtral's): from {coarse:,}",
    "An active expert has k/E of the step's tokens. It is that share, not the width of an expert, "
    "that decides.",
)
_BATCHING = _Words(
    "A larger batch helps a MoE layer less than a dense one",
    "argued from the experts that a batch reads",
    "8 of 256: {distinct:.0f} experts read by 32 tokens, {one:.0f} by one; a dense layer reads the "
    "same weights",
    "More tokens choose more experts, until all are read.",
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
    "Tasks agree, loss does not: pooled over this project's tasks k = 6 loses nothing that can be "
    "seen (docs/results/quality.md). A small model is not DeepSeek-V3.",
)
_NO_DEGRADATION = _Words(
    "At least 10% more throughput without any degradation",
    "the abstract; k = 6 at concurrency 32",
    "DeepSeek-V3, k = 6: {ours:+.1f}% at 32, modelled; reference model, k = 6: loss {six}",
    "The gain is there at that load, not at others; the loss is not nothing on the one model whose "
    "loss was measured.",
)
_EARLY_LAYERS = _Words(
    "Fewer experts in early layers are better than all",
    "(6, 8, 8, 61): 73.3 for 73.0",
    "reference model, {best}",
    "A difference of 0.3 points on six tasks is within what documents differ.",
)
_SHAPES = _Words(
    "Experts a token should rise over V3's layers, and fall over V2-Lite's",
    "best shapes on tasks",
    "reference model, 6 on average: rising {rising}, falling {falling}, 6 everywhere {six}",
    "Neither shape is better than an even k here.",
)
_SOFTMAX = _Words(
    "Softmax routers bear skipping better than sigmoid ones",
    "V2-Lite beside V3",
    "one router, a sigmoid",
    "V2-Lite does not normalise its weights and V3 does: the two models do not tell router and "
    "normalisation apart.",
)
_FEWER_IN_TOTAL = _Words(
    "Fewer experts in total gain little speed and lose much quality",
    "the abstract; V2-Lite and V3",
    "half of the experts: DeepSeek-V3 {low:+.1f}% to {high:+.1f}% by load, modelled; reference "
    "model, loss {best} by the best criterion",
    "The loss is severe. Little speed holds for few requests; where a step reads every expert, "
    "half as many gain more than that by the model. On the reference model the gain is small at "
    "every load (docs/results/pruning.md).",
)
_LEAST_USED = _Words(
    "Experts that are used least can be pruned",
    "activation and soft counts",
    "48 of 64: by count {counted}, at random {chance}; 32 of 64: by soft count {soft}, at random "
    "{half}",
    "Counts are no better than chance while few are pruned. The sum of routing weights, the "
    "paper's best, is at a half; criteria that look at outputs are better than both.",
)
_BY_NUMBER = _Words(
    "Even-numbered and last-half experts are better kept than random ones",
    "tasks on V2-Lite and V3",
    "48 of 64: even {even}, last half {last}, random {chance}",
    "An expert's number says nothing in a model trained from another seed.",
)


def claims_of(results: StudyResults) -> list[Claim]:
    """Every claim; those on quality where both settings were measured."""
    quality = () if results.quality is None else quality_claims(results.quality, results.table_9)
    return [
        *speed_claims(results.table_9, results.v2_lite, results.analysis),
        *quality,
        _claim(_SOFTMAX, UNTESTED),
    ]


def speed_claims(nine: Table9, lite: V2Lite, analysis: Analysis) -> list[Claim]:
    """The claims on throughput and on bytes and products."""
    starts = analysis.compute_bound_from
    later = starts["fine"] > starts["coarse"]
    width = {"wrong": paper.SHARED_WIDTH_OF_TABLE_1, "right": paper.EXPERT_WIDTH}
    read = {row.tokens: row.fine.distinct or 0.0 for row in analysis.rows}
    grows = read[AT] > 2 * read[1]
    return [
        _a_tenth(nine),
        _every_load(nine),
        _u_on_v2_lite(lite),
        _claim(_WIDTHS, PARTLY, **width, times=analysis.too_much),
        _claim(_MEMORY_BOUND, CONFIRMED if later else REFUTED, **starts),
        _claim(_BATCHING, CONFIRMED if grows else REFUTED, distinct=read[AT], one=read[1]),
        _claim(_VOLUME, CONFIRMED, touched=ranks_touched(256, 8, 8, 1, 1)),
    ]


def _claim(words: _Words, verdict: str, **figures: object) -> Claim:
    claim, cited, ours, why = (part.format(**figures) for part in astuple(words))
    return Claim(claim, cited, ours, verdict, why)


def _a_tenth(nine: Table9) -> Claim:
    rows = {row.concurrency: row for row in nine.rows}
    at_32 = rows.pop(AT)
    cited = [row.paper_gain["6"] for row in rows.values()]
    ours = [row.gain["6"] for row in rows.values()]
    is_trend = (AT, 6) not in paper.BROKEN
    return _claim(
        _A_TENTH,
        CONFIRMED if is_trend and abs(at_32.off["6"]) <= WITHIN else PARTLY,
        cited=at_32.paper_gain["6"],
        low=min(cited),
        high=max(cited),
        ours=at_32.gain["6"],
        least=min(ours),
        most=max(ours),
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


def quality_claims(quality: StudiedQuality, nine: Table9) -> Iterator[Claim]:
    """The claims on quality, for which all settings were measured."""
    measured = {(row.group, row.name, round(row.share, 6)): row.increase for row in quality.rows}
    six, kept = (measured.get((group, "k=6", 1.0)) for group in ("k", "k, weights kept"))
    if six and kept:
        gain = next(row.gain["6"] for row in nine.rows if row.concurrency == AT)
        verdict = PARTLY if six.low > NOTHING else CONFIRMED
        yield _claim(_TWO_FEWER, verdict, six=_shown(six), kept=_shown(kept))
        yield _claim(_NO_DEGRADATION, verdict, ours=gain, six=_shown(six))
    if best := measured.get(("shape", BEST_SHAPE, 1.0)):
        yield _claim(_EARLY_LAYERS, REFUTED if best.low > 0 else PARTLY, best=_shown(best))
    names = {"rising": "rising, 4 to 8", "falling": "falling, 8 to 4"}
    rising, falling = (measured.get(("shape", name, 1.0)) for name in names.values())
    if six and rising and falling:
        is_even = six.ratio < min(rising.ratio, falling.ratio)
        shown = {"rising": _shown(rising), "falling": _shown(falling), "six": _shown(six)}
        yield _claim(_SHAPES, REFUTED if is_even else PARTLY, **shown)
    pruned = {
        share: {
            name: each
            for (group, name, of), each in measured.items()
            if group == "pruning" and of == share
        }
        for share in (0.5, 0.75)
    }
    if all(pruned.values()):
        yield from _pruning_claims(pruned[0.5], pruned[0.75], nine)


def _pruning_claims(
    half: Mapping[str, LossChange], most: Mapping[str, LossChange], nine: Table9
) -> Iterator[Claim]:
    """Claims on fewer experts in total, by what a half and three quarters of them lose."""
    gains = next(each.gain for each in nine.kept_experts if each.share == 0.5)
    best = min(half.values(), key=lambda change: change.ratio)
    is_small = max(gains) < LIMITED
    yield _claim(
        _FEWER_IN_TOTAL,
        (CONFIRMED if is_small else PARTLY) if best.low > SEVERE else REFUTED,
        low=min(gains),
        high=max(gains),
        best=_shown(best),
    )
    by_count, chance = most["activate-count"], most["random"]
    wins = [by_count.high < chance.low, half["soft-count"].high < half["random"].low]
    shown = {"counted": by_count, "chance": chance, "soft": half["soft-count"]}
    shown["half"] = half["random"]
    yield _claim(
        _LEAST_USED,
        CONFIRMED if all(wins) else PARTLY if any(wins) else REFUTED,
        **{name: _shown(change) for name, change in shown.items()},
    )
    even, last = most["even"], most["last-half"]
    better = [each.high < chance.low for each in (even, last)]
    yield _claim(
        _BY_NUMBER,
        CONFIRMED if all(better) else PARTLY if any(better) else REFUTED,
        even=_shown(even),
        last=_shown(last),
        chance=_shown(chance),
    )


def _shown(increase: LossChange) -> str:
    ratio, low, high = (100 * each for each in (increase.ratio, increase.low, increase.high))
    return f"{ratio:+.1f}% [{low:.1f}, {high:.1f}]"
