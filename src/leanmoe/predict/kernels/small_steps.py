"""Small steps of vLLM's Triton kernel, slot by slot: what they read, and when that is read twice.

Up to a quarter as many slots as experts vLLM 0.24.0 does not group slots by expert
(`moe_align_block_size` is left out): every slot is a row of blocks of its own, in the order of the
slots, each of which reads a piece of its expert. Blocks that run at the same time read in step, so
slots that share an expert share its bytes if their blocks do. How many slots run at the same time
follows from the launch: how many blocks a multiprocessor holds beside each other (shared memory),
and whether blocks of several slots are put side by side (GROUP_SIZE_M).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from leanmoe.predict.constants import ANY
from leanmoe.predict.hardware.gpus import Gpu
from leanmoe.predict.kernels.features import ExpertsShape, Rows

SLOT_BY_SLOT: Mapping[tuple[str, str], float] = {
    ("vllm-triton", "bfloat16"): 1 / 4,
    ("vllm-triton", "fp8_block"): 1 / 4,
}
"""By kernel and format: up to so many slots for each of the layer's experts, where these are not
spread over GPUs. vLLM's mxfp4 kernels are OpenAI's, which group all steps."""
SHARED_MEMORY = 227 * 1024
"""Bytes that the blocks on a multiprocessor of compute capability 9.0 may have (CUDA C++
Programming Guide, technical specifications)."""
MOST_BLOCKS = 16
"""Blocks of 4 warps on a multiprocessor: it holds 64 warps (the same table)."""
ROWS = 16
"""Rows of a block in a small step."""
CACHED_SHARE = 0.6
"""Share of a read's time that the same read takes from the second-level cache: 3.35 TB/s of memory
to about 5.5 of an H100's cache, a figure without a source at hand. The steps of Qwen3-30B had been
looked at before and imply 0.6 to 0.7: they do not test it."""


class SmallSteps(Enum):
    """What an engine makes of steps that such a kernel would run slot by slot."""

    REPEAT = "repeat"
    """Slot by slot; a skipped slot is its token's best expert again."""
    SKIP = "skip"
    """Slot by slot; a skipped slot costs nothing."""
    GROUP = "group"
    """Grouped by expert where two tokens or more share experts; as `SKIP` elsewhere. So leanmoe's
    plugin has it (`engines/vllm/skipping.py`) but with data parallelism, where it repeats."""


@dataclass(frozen=True)
class Launch:
    """How the kernel is launched, in the words of vLLM's configurations."""

    columns: int
    """BLOCK_SIZE_N."""
    depth: int
    """BLOCK_SIZE_K."""
    stages: int
    """num_stages: pieces of that depth that a block has on their way."""
    group: int = 1
    """GROUP_SIZE_M: slots whose blocks of the same columns run next to each other."""

    def decode_batch(self, width: float, value_bytes: float, gpu: Gpu) -> float:
        """Slots whose blocks run at the same time, of a product that is so wide."""
        each = (ROWS + self.columns) * self.depth * value_bytes * self.stages
        blocks = max(1, min(MOST_BLOCKS, SHARED_MEMORY // each)) * gpu.multiprocessors
        return max(float(self.group), blocks / math.ceil(width / self.columns))


DEFAULT = {1.0: Launch(128, 128, 3), 2.0: Launch(64, 128, 4)}
"""By bytes of a value: `get_default_config` for 16 tokens or fewer, fp8 blocks and bf16."""
TUNED: Mapping[tuple[str, int, int], tuple[tuple[float, Launch], ...]] = {
    ("h100", 128, 2880): (
        (1, Launch(32, 64, 4)),
        (3, Launch(32, 64, 3)),
        (12, Launch(64, 128, 4, 64)),
        (ANY, Launch(32, 256, 5, 16)),
    )
}
"""By GPU, experts and expert width: vLLM's own configuration in bf16, up to so many tokens. Here is
gpt-oss-120b's alone (`E=128,N=2880,device_name=NVIDIA_H100_80GB_HBM3.json`, as 0.32.0 has it; the
columns are those of 0.24.0). Other layers with a configuration are taken as by default, although
some of theirs put slots side by side, too."""


def launch_of(shape: ExpertsShape, tokens: float, gpu: Gpu) -> Launch:
    """The launch of a small step."""
    steps = TUNED.get((gpu.name, shape.experts, int(shape.width)), ())
    is_tuned = shape.activation_bytes > 1 and shape.width == int(shape.width)
    found = (launch for up_to, launch in steps if is_tuned and tokens <= up_to)
    return next(found, DEFAULT[shape.activation_bytes])


def slot_by_slot(shape: ExpertsShape, rows: Rows, columns: float, gpu: Gpu) -> Rows:
    """Where each of `columns` slots of the step is a row of blocks of its own.

    Slots that do not run at the same time read a shared expert anew; those that do, from the cache,
    which serves all slots' reads at its own rate meanwhile. A repeated slot is its token's best
    beside it: a row of blocks more, and what was just read. Slots that are passed over are not
    among them.
    """
    launch, gates = launch_of(shape, rows.tokens, gpu), shape.matrices - 1
    of_up, of_down = (
        _reads(rows, launch.decode_batch(width, shape.activation_bytes, gpu))
        for width in (shape.padded_width * gates, shape.padded_hidden)
    )
    reads = (gates * of_up + of_down) / shape.matrices
    reads = max(reads, CACHED_SHARE * rows.rows)
    blocks = (1,) * max(1, round(reads + columns - rows.rows))
    return Rows(rows.tokens, columns / rows.tokens, columns, reads, blocks)


def _reads(rows: Rows, decode_batch: float) -> float:
    """Experts that are read, each time counted, where so many slots run at the same time."""
    if decode_batch >= rows.rows or rows.distinct >= rows.rows:
        return rows.distinct
    among = distinct_among(decode_batch, rows.rows, rows.distinct)
    return min(rows.rows, max(rows.distinct, rows.rows / decode_batch * among))


def distinct_among(some: float, slots: float, distinct: float) -> float:
    """Distinct experts of `some` neighbouring slots, of `slots` that have `distinct`.

    As of draws from P equally likely experts, P such that all slots have P(1-(1-1/P)^n) of them.
    """
    low, high = distinct, distinct * slots**2
    for _ in range(60):
        pool = math.sqrt(low * high)
        low, high = (pool, high) if _distinct_of(pool, slots) < distinct else (low, pool)
    return min(some, _distinct_of(high, some))


def _distinct_of(pool: float, draws: float) -> float:
    return pool if pool <= 1 else -pool * math.expm1(draws * math.log1p(-1 / pool))
