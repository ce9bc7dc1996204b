"""Bytes a weight takes as it is stored, from a config.json's dtype and quantisation.

Needs no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from leanmoe.models.hf_config import HfConfig

PLAIN = {"float32": 4.0, "float": 4.0, "bfloat16": 2.0, "float16": 2.0, "half": 2.0}
"""Bytes of a weight that is not quantised, by the dtype's name."""
DEFAULT_DTYPE = "bfloat16"
SCALE_BYTES = 2
"""Bits of a group's scale in the integer formats; fp8 has 4, mxfp4 and nvfp4 have 1."""
ATTENTION_MARKS = ("attn", "attention")
"""In a list of modules left alone, these say that only the experts are quantised."""


@dataclass(frozen=True)
class Storage:
    """How a model's weights are stored."""

    name: str
    """The format of the routed experts' weights, as shown to a reader."""
    expert_bytes: float
    """Bytes of one weight of a routed expert, its share of the scales included."""
    other_bytes: float
    """Bytes of one weight of attention, dense layers and shared experts."""
    plain_bytes: float
    """Bytes of one weight that is never quantised: embedding, head, router, norms."""


def storage(settings: HfConfig) -> Storage:
    """Reads `quantization_config`; a method that is not known is named and counted as plain."""
    dtype = str(settings.raw("dtype") or settings.raw("torch_dtype") or DEFAULT_DTYPE)
    dtype = dtype.removeprefix("torch.")
    plain = PLAIN.get(dtype, PLAIN[DEFAULT_DTYPE])
    quantised = settings.part("quantization_config")
    method = quantised.raw("quant_method")
    if method is None:
        return Storage(dtype, plain, plain, plain)
    known = _format(str(method), quantised)
    if known is None:
        return Storage(f"{dtype} (as if: {method} is not known)", plain, plain, plain)
    name, stored = known
    return Storage(name, stored, plain if _experts_only(quantised) else stored, plain)


def _format(method: str, quantised: HfConfig) -> tuple[str, float] | None:
    """Name of the format and bytes a weight; None for a method that is not known."""
    if method in ("fp8", "fbgemm_fp8"):
        block = quantised.items("weight_block_size", int)
        each = 4 / (block[0] * block[1]) if block and len(block) == 2 and all(block) else 0.0
        return "fp8", 1 + each
    if method == "mxfp4":
        return "mxfp4", 0.5 + 1 / 32
    if method in ("gptq", "awq"):
        return _integer(quantised.whole("bits", 4, least=1), quantised.whole("group_size", 128, -1))
    if method == "bitsandbytes":
        return ("int8", 1.0) if quantised.flag("load_in_8bit") else ("nf4", 0.5 + 4 / 64)
    if method == "compressed-tensors":
        return _compressed(quantised)
    return None


def _compressed(quantised: HfConfig) -> tuple[str, float] | None:
    groups = quantised.part("config_groups")
    if not groups.values:
        return None
    weights = groups.part(next(iter(groups.values))).part("weights")
    bits = weights.whole("num_bits", 8, least=1)
    if weights.raw("type") == "float":
        return ("fp8", 1.0) if bits == 8 else ("nvfp4", 0.5 + 1 / 16)
    return _integer(bits, weights.whole("group_size", 0, -1))


def _integer(bits: int, group: int) -> tuple[str, float]:
    return f"int{bits}", bits / 8 + (SCALE_BYTES / group if group > 0 else 0.0)


def _experts_only(quantised: HfConfig) -> bool:
    ignored = quantised.raw("modules_to_not_convert") or quantised.raw("ignore") or ()
    return any(mark in str(name) for name in ignored for mark in ATTENTION_MARKS)
