"""Bytes a weight takes as it is stored: from the shards' headers, or a config.json's settings.

Needs no torch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from leanmoe.models.hf_config import FILE, HfConfig
from leanmoe.models.modules import Module, UnknownFormatError
from leanmoe.models.quantisation import Format, rule_of

PLAIN = {
    "float32": 4.0, "float": 4.0, "bfloat16": 2.0, "float16": 2.0, "half": 2.0,
    "float8_e4m3fn": 1.0, "float8_e5m2": 1.0,
}  # fmt: skip
"""Bytes of a weight that is not quantised, by the dtype's name."""
DEFAULT_DTYPE = "bfloat16"


@dataclass(frozen=True)
class Storage:
    """How a model's weights are stored: bytes of one weight of each part, scales included."""

    name: str
    """The format of the routed experts' weights, as shown to a reader; several where they mix."""
    expert_bytes: float
    """One routed expert."""
    mixer_bytes: float
    """Attention, and what stands in its place."""
    dense_bytes: float
    shared_bytes: float
    head_bytes: float
    embedding_bytes: float
    router_bytes: float
    plain_bytes: float
    """Norms, and whatever else is never quantised."""
    unknown: str | None = None
    """Why none of these bytes can be told; they stand as those of the dtype then, and what depends
    on them is not shown."""
    source: str = FILE
    """What the bytes were read from."""


FIELDS: Mapping[str, str] = {
    "expert": "expert_bytes", "mixers": "mixer_bytes", "dense": "dense_bytes",
    "shared": "shared_bytes", "head": "head_bytes", "embedding": "embedding_bytes",
    "routers": "router_bytes",
}  # fmt: skip
"""Where the bytes of each part of `Parameters` stand in `Storage`."""


def storage(settings: HfConfig, modules: Iterable[Module]) -> Storage:
    """What dtype and `quantization_config` say of each of the modules.

    Settings that are not understood leave `unknown` with the reason.
    """
    dtype = str(settings.raw("dtype") or settings.raw("torch_dtype") or DEFAULT_DTYPE)
    dtype = dtype.removeprefix("torch.")
    plain = Format(dtype, PLAIN.get(dtype, PLAIN[DEFAULT_DTYPE]))
    unknown = None if dtype in PLAIN else f"dtype {dtype!r} is not known"
    quantised = settings.part("quantization_config")
    formats: Mapping[str, Mapping[Format, int]] = {}
    if quantised.values:
        try:
            whole = {"expert_dtype": settings.raw("expert_dtype")}  # DeepSeek-V4's stands outside
            formats = _formats(HfConfig({**whole, **quantised.values}), modules, plain)
        except UnknownFormatError as error:
            unknown = f"quantization_config: {error}"
    names = sorted(formats.get("expert", {plain: 1}).items(), key=lambda pair: -pair[1])
    return Storage(
        name="not known" if unknown else " and ".join(dict.fromkeys(f.name for f, _ in names)),
        plain_bytes=plain.stored,
        unknown=unknown,
        source=FILE,
        **{FIELDS[part]: _mean(formats.get(part, {plain: 1})) for part in FIELDS},
    )


def _formats(
    quantised: HfConfig, modules: Iterable[Module], plain: Format
) -> dict[str, dict[Format, int]]:
    """How many weights of each part have each format."""
    rule = rule_of(quantised)
    formats: dict[str, dict[Format, int]] = defaultdict(lambda: defaultdict(int))
    for module in modules:
        if module.weights:
            formats[module.part][rule(module) or plain] += module.weights
    return formats


def _mean(formats: Mapping[Format, int]) -> float:
    return sum(each.stored * count for each, count in formats.items()) / sum(formats.values())
