"""The engines' hooks run in stand-ins of their engines, Triton's programs in its interpreter."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.kernels.triton import conftest as interpreter
from tests.serve.stand_ins import install_context

assert interpreter, "importing it chooses Triton's interpreter where there is no GPU"


@pytest.fixture(autouse=True, scope="package")
def _no_step_of_vllm() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        install_context(patch, None)
        yield
