"""Which of a checkpoint's tensors belong to routed experts, by their names and sizes.

Holds for every family: the experts of a block are either tensors of their own, numbered
(`experts.7.up_proj.weight`), or one tensor for all of them (`experts.gate_up_proj`), and the
router beside them has a row for each.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from leanmoe.core.errors import LeanMoeError

Kind = Literal["numbered", "first_axis", "last_axis"]

_BLOCK = re.compile(r"^((?:.*\.)?layers\.(\d+)(?:\.[a-z_0-9]+)*?)\.experts\.")
_LINEARS = re.compile(r"^((?:.*\.)?layers\.(\d+)(?:\.[a-z_0-9]+)*?)\.(?:input|output)_linear\.")
_NUMBERED = re.compile(r"\.experts\.(\d+)\.")
_ROUTER = re.compile(r"(?:gate|router)(?:\.(?:gate|wg|layer|classifier|proj))?\.\w+")
_BIAS = re.compile(r"(?:[\w.]+\.)?(?:e_score_correction_bias|expert_bias)")


@dataclass(frozen=True)
class TensorPart:
    """What one tensor holds of an MoE layer's experts."""

    decoder_index: int
    kind: Kind
    """A tensor of one expert, or one whose first or last axis is the experts."""
    expert: int | None = None
    """The number of a numbered one."""


def expert_parts(shapes: Mapping[str, Sequence[int]], experts: int) -> dict[str, TensorPart]:
    """The tensors, by name, that change when experts go; `shapes` are all of the checkpoint's."""
    blocks = _blocks(shapes)
    found: dict[str, TensorPart] = {}
    for name, shape in shapes.items():
        block = next((b for b in _prefixes(name) if b in blocks), None)
        if block is None:
            continue
        part = _part(name, name[len(block) + 1 :], shape, blocks[block], experts)
        if part is not None:
            found[name] = part
    return found


def check_parts(parts: Mapping[str, TensorPart], layers: Iterable[int], experts: int) -> None:
    """Raises LeanMoeError unless every MoE layer has all of its experts and a router."""
    for layer in layers:
        own = {name: part for name, part in parts.items() if part.decoder_index == layer}
        numbered = {part.expert for part in own.values() if part.kind == "numbered"}
        missing = sorted(set(range(experts)) - numbered) if numbered else []
        if missing:
            raise LeanMoeError(
                f"the checkpoint lacks experts {missing[:8]} of layer {layer}: a shard is missing"
            )
        whole = [name for name, part in own.items() if part.kind == "first_axis"]
        if not numbered and not any(".experts." in n or "_linear." in n for n in whole):
            raise LeanMoeError(
                f"the checkpoint has no expert weights in layer {layer} under a name known here"
            )
        if not any(_is_router(name) for name in whole):
            raise LeanMoeError(f"the checkpoint has no router with {experts} rows in layer {layer}")


def renumbered(name: str, expert: int) -> str:
    """A numbered expert's tensor under another number."""
    return _NUMBERED.sub(f".experts.{expert}.", name, count=1)


def _blocks(names: Iterable[str]) -> dict[str, int]:
    """Prefixes of MoE blocks, and the decoder layer each is in."""
    found = {}
    for name in names:
        match = _BLOCK.match(name) or _LINEARS.match(name)
        if match:
            found[match[1]] = int(match[2])
    return found


def _prefixes(name: str) -> list[str]:
    words = name.split(".")
    return [".".join(words[:n]) for n in range(len(words) - 1, 0, -1)]


def _part(
    name: str, inside: str, shape: Sequence[int], layer: int, experts: int
) -> TensorPart | None:
    """What a tensor of an MoE block is, by its name inside the block."""
    match = _NUMBERED.search(name)
    if match and inside.startswith("experts."):
        return TensorPart(layer, "numbered", int(match[1]))
    if _BIAS.fullmatch(inside) and shape and shape[-1] == experts:
        return TensorPart(layer, "last_axis")
    is_expert = inside.startswith(("experts.", "input_linear.", "output_linear."))
    if (is_expert or _ROUTER.fullmatch(inside)) and shape and shape[0] == experts:
        return TensorPart(layer, "first_axis")
    return None


def _is_router(name: str) -> bool:
    return re.search(rf"\.{_ROUTER.pattern}$", name) is not None
