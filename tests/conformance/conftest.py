"""Triton's programs run in its interpreter where there is no GPU."""

from tests.kernels import conftest as interpreter

assert interpreter, "importing it chooses Triton's interpreter where there is no GPU"
