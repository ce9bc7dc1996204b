"""Bytes of a checkpoint's tensors by what they are for, from its shards' headers alone. No torch.

A safetensors file begins with eight bytes, the length of a JSON object that lists its tensors
(https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from leanmoe.core.errors import LeanMoeError
from leanmoe.core.files import read_json
from leanmoe.models.parameters import Parameters
from leanmoe.models.weight_format import FIELDS, Storage

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MOST_HEADER_BYTES = 100_000_000
"""The longest header that the safetensors library reads."""
IN_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.(.+)")
OTHER_STACKS = re.compile(
    r"(^|\.)(visual|vision\w*|audio\w*|mtp|talker|code2wav|multi_modal\w*|mm_projector)(\.|$)"
)
"""Parts of a checkpoint beside the language model's decoder layers."""
MIXERS = re.compile(r"^(self_)?(attn|attention)|^(linear_attn|mamba|conv|mixer)(\.|$)")
ROUTERS = re.compile(
    r"(^|\.)(gate|router|wg|e_score_correction_bias|expert_bias|moe_statics)(\.|$)"
)
EMBEDDING = re.compile(r"(^|\.)(embed|embed_tokens|word_embeddings|tok_embeddings|wte)\.")
HEAD = re.compile(r"(^|\.)(lm_head|head|output)\.")
EXPERTS = re.compile(r"(^|\.)(experts|switch_mlp)\.|^(block_sparse_moe|moe)\.")
DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F8_E4M3": "fp8"}
LFS = b"version https://git-lfs"
CLOSE = 0.03
"""How far headers and settings may differ for the settings' name of the format to stand."""
LEAST_BYTES = 0.1
"""Fewer bytes a weight mean that the tensors' names are not those known here."""


def from_shards(
    stored: Storage, folder: Path, parameters: Parameters, layers: int, experts: int
) -> Storage:
    """What the shards in a folder say, part by part; `stored` where not all of them are there.

    `experts` is the number of all routed experts in all `layers`. Raises LeanMoeError for a shard
    that is damaged.
    """
    sizes, dtypes = _sizes(folder, layers)
    expert = sizes["expert"] / max(1, experts * parameters.expert)
    if expert < LEAST_BYTES:
        return stored

    is_as_said = stored.unknown is None and abs(expert / stored.expert_bytes - 1) < CLOSE
    name = DTYPES.get(dtypes.most_common(1)[0][0], f"{8 * expert:.3g} bits")
    weights = {part: getattr(parameters, part) for part in sizes}
    own = {FIELDS[part]: sizes[part] / count for part, count in weights.items() if count}
    return replace(
        stored,
        **{**own, "expert_bytes": expert},
        name=stored.name if is_as_said else name,
        unknown=None,
        source="headers of the shards",
    )


def _sizes(folder: Path, layers: int) -> tuple[Mapping[str, int], Counter[str]]:
    """Bytes of each part, and of the experts by dtype; nothing where a shard is missing."""
    sizes: dict[str, int] = defaultdict(int)
    dtypes: Counter[str] = Counter()
    for path in _shards(folder):
        for name, tensor in read_header(path)[0].items():
            part = _part(name, layers)
            if part is None:
                continue
            start, end = tensor["data_offsets"]
            sizes[part] += end - start
            if part == "expert":
                dtypes[str(tensor.get("dtype"))] += end - start
    return sizes, dtypes


def _shards(folder: Path) -> list[Path]:
    """All shards of the checkpoint, or none where one of them is not there."""
    if (folder / INDEX).is_file():
        index = read_json(folder / INDEX, "index")
        listed = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(listed, dict):
            raise LeanMoeError(f"index {folder / INDEX} has no weight_map")
        paths = sorted({folder / str(name) for name in listed.values()})
    else:
        paths = [folder / SINGLE]
    return paths if all(path.is_file() and not _is_pointer(path) for path in paths) else []


def _is_pointer(path: Path) -> bool:
    """Whether a file only says where Git LFS keeps the shard."""
    with path.open("rb") as file:
        return file.read(len(LFS)) == LFS


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """A shard's tensors by name, and where in the file their bytes begin.

    Raises LeanMoeError for a header that is none.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > MOST_HEADER_BYTES:
                raise ValueError(f"its header has {length} bytes")
            tensors = json.loads(file.read(length))
        tensors.pop("__metadata__", None)
        for name, tensor in tensors.items():
            first, end = tensor["data_offsets"]
            if type(first) is not int or type(end) is not int or not 0 <= first <= end < 1 << 63:
                raise ValueError(f"its header has no offsets of {name}")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise LeanMoeError(f"shard {path} is damaged: {error}") from error
    return tensors, 8 + length


def _part(name: str, layers: int) -> str | None:
    """What a tensor is for; None for norms and for what is none of the decoder's `layers`."""
    if OTHER_STACKS.search(name):
        return None
    match = IN_LAYER.search(name)
    if match is None:
        return "embedding" if EMBEDDING.search(name) else "head" if HEAD.search(name) else None
    if int(match[1]) >= layers:  # layers that predict further tokens
        return None
    rest = match[2]
    if "shared" in rest or "share_expert" in rest or rest.startswith("mlps."):
        return "shared"
    if rest.startswith("mixer.gate.") or (ROUTERS.search(rest) and not MIXERS.search(rest)):
        return "routers"
    if EXPERTS.search(rest):
        return "expert"
    if MIXERS.search(rest):
        return "dense" if rest.startswith(("mixer.up_proj", "mixer.down_proj")) else "mixers"
    return "dense" if rest.startswith(("mlp.", "feed_forward.")) else None
