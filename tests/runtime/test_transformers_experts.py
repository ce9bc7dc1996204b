"""Our kernels behind Transformers' experts interface."""

from __future__ import annotations

import pytest

from leanmoe.runtime import has_kernel, served_experts
from tests.runtime.families import CONFIGS, build


@pytest.mark.parametrize("family", CONFIGS)
def test_every_familys_gate_is_one_our_kernel_knows(family: str) -> None:
    """Else its full model would run on the slow reference, and any plan would look fast."""
    assert has_kernel(build(family))
    assert served_experts(build(family)) == "leanmoe"
