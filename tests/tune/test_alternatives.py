"""What stands beside the search's plans: which of two ways is said to lose less, and memory."""

from __future__ import annotations

import pytest

from leanmoe.models.hf_config import read_config
from leanmoe.models.shape import read_shape
from leanmoe.stats.paired import Estimate
from leanmoe.tune import alternatives


@pytest.mark.parametrize(
    ("low", "high", "is_as_fast", "said"),
    [
        (-0.02, -0.01, True, "fewer a token loses less"),
        (0.01, 0.02, True, "fewer in total loses less"),
        (-0.01, 0.02, True, "undecided"),
        (-0.02, -0.01, False, "no skipping is as fast"),
    ],
)
def test_only_ways_as_fast_are_compared(
    low: float, high: float, is_as_fast: bool, said: str
) -> None:
    found = Estimate((low + high) / 2, low, high, high, 40)
    assert alternatives.verdict(found, is_as_fast) == said


def test_memory_falls_by_the_bytes_of_the_experts_that_go() -> None:
    four_bits = {"quant_method": "mxfp4", "modules_to_not_convert": ["self_attn", "mlp.gate"]}
    shape = read_shape({**read_config("reference"), "quantization_config": four_bits})
    assert shape.storage.expert_bytes < shape.storage.mixer_bytes
    everything = shape.total_bytes()
    one_less = 1 - alternatives.memory_share(shape, shape.experts - 1)
    assert alternatives.memory_share(shape, shape.experts) == 1
    assert one_less * everything == pytest.approx(len(shape.moe_layers) * shape.expert_bytes)
