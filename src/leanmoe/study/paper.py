"""Figures of *Faster MoE LLM Inference for Extremely Large Models*, cited (arXiv 2505.03531)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise

V3, V2_LITE = "deepseek-ai/DeepSeek-V3", "deepseek-ai/DeepSeek-V2-Lite"

TABLE_9: Mapping[int, Mapping[int, float]] = {
    2: {8: 163, 6: 164, 4: 167, 3: 170},
    4: {8: 300, 6: 308, 4: 312, 3: 323},
    8: {8: 526, 6: 537, 4: 554, 3: 575},
    16: {8: 769, 6: 793, 4: 820, 3: 979},
    32: {8: 1204, 6: 1331, 4: 1401, 3: 1705},
    64: {8: 1666, 6: 1751, 4: 1851, 3: 1900},
    128: {8: 2751, 6: 2806, 4: 2985, 3: 3100},
}
"""Tokens a second of DeepSeek-V3 on 8 H200 by concurrency and k, 1,024 tokens in and out."""
BROKEN = frozenset({(16, 3), (32, 3), (32, 6)})
"""Concurrency and k of the points that break Table 9's own trend."""
V2_LITE_GAINS: Mapping[int, float] = {2: 13.6, 8: 18.5, 32: 7.8, 128: 4.0, 256: 2.3, 512: 6.1}
"""Percent that k = 4 for 6 gains on DeepSeek-V2-Lite on 2 A800, by concurrency."""
EXPERT_WIDTH, SHARED_WIDTH_OF_TABLE_1 = 2048, 18432
"""Table 1's widths of DeepSeek-V3's experts: the first is right, and the shared expert's, too; the
second is that of the three dense layers."""
EXPERTS_KEPT = (64, 48, 32, 16)


def trend_breaks(points: float) -> list[tuple[int, int, float]]:
    """Where Table 9 breaks its own trend: concurrency, k, and by how many points of percent.

    The trend at a concurrency is the geometric mean of the gains over k = 8 at its two neighbours
    (the table's own second difference). An outlier pulls both neighbours' trends by half of itself,
    so of a run of breaks with alternating signs only the largest is named.
    """
    loads = list(TABLE_9)
    broken = []
    for k in (6, 4, 3):
        logs = [math.log(TABLE_9[load][k] / TABLE_9[load][8]) for load in loads]
        off = [
            100 * math.expm1(logs[n] - (logs[n - 1] + logs[n + 1]) / 2)
            for n in range(1, len(loads) - 1)
        ]
        breaks = [(n, value) for n, value in enumerate(off) if abs(value) > points]
        kept = dict(breaks)
        for (one, first), (other, second) in pairwise(breaks):
            if other == one + 1 and first * second < 0:
                kept.pop(one if abs(first) < abs(second) else other, None)
        broken += [(loads[n + 1], k, value) for n, value in kept.items()]
    return broken
