"""A checkpoint without some of its experts, written shard by shard, never touching the source.

At no time is more in memory than the tensors of one output shard. What is finished stays: a run
that was stopped goes on where it was. The config is written last, so that nothing loads before
everything is there.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from leanmoe.core.errors import LeanMoeError
from leanmoe.core.files import read_json, size_text, write_json, write_with
from leanmoe.models.hf_config import FILE, NAMES, TEXT_PARTS
from leanmoe.models.shape import MoEShape, read_shape
from leanmoe.models.shards import INDEX, SINGLE, read_header
from leanmoe.prune.criteria import Kept, check_count
from leanmoe.prune.quantisation import SETTINGS, Chosen, is_settings_file, renumbered_settings
from leanmoe.prune.tensor_names import (
    TensorPart,
    check_parts,
    decoder_stack,
    expert_parts,
    is_of_head,
    renumbered,
    stack_and_layer,
)

STATE = ".leanmoe-prune.json"
"""In an output folder that is not finished."""
RECORD = "leanmoe_prune.json"
"""In a finished one: what was kept, and why."""
HEADS = re.compile(r"num_(?:mtp|nextn)_\w+|(?:mtp|nextn)_num_\w+|(?:use|with)_mtp")
"""Settings that count layers beyond the decoder's, which predict ahead: these are left out."""

Progress = Callable[[int], None]
"""Called with the number of shards just done."""


@dataclass(frozen=True)
class Source:
    """A checkpoint's files and tensors, read from the headers of its shards."""

    folder: Path
    config: dict[str, Any]
    shape: MoEShape
    shards: dict[str, tuple[str, ...]]
    """Tensor names by file."""
    sizes: dict[str, tuple[int, ...]]
    bytes: dict[str, int]
    stack: str
    """What the decoder's layers are one of; other stacks with experts stay whole."""
    parts: dict[str, TensorPart]


def read_source(folder: Path) -> Source:
    """Reads and checks a checkpoint's headers; weights are not read.

    Raises LeanMoeError, naming the file, for a shard that is missing or truncated, and for a
    checkpoint whose experts are not found.
    """
    config = read_json(folder / FILE, "config")
    shape = read_shape(config)
    shards: dict[str, tuple[str, ...]] = {}
    sizes: dict[str, tuple[int, ...]] = {}
    lengths: dict[str, int] = {}
    index = _index(folder)
    for file in _shard_names(folder, index):
        header = _header(folder / file)
        shards[file] = tuple(header)
        for name, (size, length) in header.items():
            sizes[name], lengths[name] = size, length
    if lost := sorted(set(index or ()) - set(sizes)):
        raise LeanMoeError(f"the index lists {lost[0]}, which no shard holds")
    stack = decoder_stack(sizes, shape.moe_layers)
    parts = expert_parts(sizes, shape.experts, stack)
    check_parts(parts, shape.moe_layers, shape.experts)
    return Source(folder, config, shape, shards, sizes, lengths, stack, parts)


def write_pruned(
    source: Source, kept: Kept, output: Path, record: Mapping[str, Any], progress: Progress
) -> None:
    """Writes the checkpoint with these experts alone to `output`.

    Raises LeanMoeError before anything is written for an output folder that holds something else,
    for too little space, and for counts that differ by layer or leave too few experts.
    """
    _check_kept(kept, source.shape)
    chosen = dict(zip(source.shape.moe_layers, kept, strict=True))
    state = {"kept": [list(experts) for experts in kept], "source": _fingerprint(source)}
    wanted = {file: _wanted(names, source, chosen) for file, names in source.shards.items()}
    config = pruned_config(source.config, source.shape, len(kept[0]), chosen)
    others = _quantisation_files(source.folder, chosen)
    sizes = _sizes(wanted, source, chosen)
    _claim(output, state, source, sizes)
    weight_map: dict[str, str] = {}
    for file, renamed in wanted.items():
        if renamed and not (output / file).is_file():
            _write_shard(source.folder / file, output / file, renamed, source, chosen)
        weight_map |= dict.fromkeys(renamed, file)
        progress(1)
    if (source.folder / INDEX).is_file():
        total = {"total_size": sum(sizes.values())}
        write_json(output / INDEX, {"metadata": total, "weight_map": weight_map})
    _copy_others(source.folder, output)
    for name, value in others.items():
        write_json(output / name, value)
    write_json(output / RECORD, {**record, "kept": state["kept"]})
    write_json(output / FILE, config)
    (output / STATE).unlink()


def check_writable(source: Source, count: int, output: Path) -> None:
    """Raises LeanMoeError, before experts are ranked, where `count` of them cannot be written.

    Whichever experts remain, the checkpoint has the same size, and a pattern that names some of
    them in the quantisation settings cannot be renumbered.
    """
    check_output(output, source)
    _check_family(source.shape)
    chosen = dict.fromkeys(source.shape.moe_layers, tuple(range(count)))
    pruned_config(source.config, source.shape, count, chosen)
    _quantisation_files(source.folder, chosen)
    wanted = {file: _wanted(names, source, chosen) for file, names in source.shards.items()}
    _require_space(output, _sizes(wanted, source, chosen))


def _sizes(
    wanted: Mapping[str, Mapping[str, str]], source: Source, chosen: Chosen
) -> dict[str, int]:
    """Bytes of each shard to be written."""
    return {
        file: sum(_new_bytes(old, source, chosen) for old in renamed.values())
        for file, renamed in wanted.items()
    }


def pruned_config(
    config: Mapping[str, Any], shape: MoEShape, kept: int, chosen: Chosen
) -> dict[str, Any]:
    """The config with `kept` experts: every key stays, those that count experts change."""
    found = dict(config)
    for part in TEXT_PARTS:
        if isinstance(found.get(part), Mapping):
            found[part] = pruned_config(found[part], shape, kept, chosen)
    for name in ("num_experts", *NAMES["num_experts"]):
        counts = found.get(name)
        if counts == shape.experts:
            found[name] = kept
        elif isinstance(counts, list):  # one number a layer, or one for text and one for images
            found[name] = [kept if count == shape.experts else count for count in counts]
    for name in filter(HEADS.fullmatch, found):
        if isinstance(found[name], int):
            found[name] = type(found[name])(0)
    for name in SETTINGS:
        if name in found:
            found[name] = renumbered_settings(found[name], chosen)
    return found


def _index(folder: Path) -> dict[str, str] | None:
    """The shard of each tensor, None where there is no index."""
    if not (folder / INDEX).is_file():
        return None
    index = read_json(folder / INDEX, "index")
    files = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(files, dict) or not files:
        raise LeanMoeError(f"{folder / INDEX} has no weight_map: it is no index of shards")
    for file in files.values():
        if not isinstance(file, str) or Path(file).name != file:
            raise LeanMoeError(f"{folder / INDEX} names the shard {file!r}: no plain file name")
    return files


def _shard_names(folder: Path, index: Mapping[str, str] | None) -> list[str]:
    if index is not None:
        return sorted(set(index.values()))
    if (folder / SINGLE).is_file():
        return [SINGLE]
    raise LeanMoeError(f"folder {folder} has neither {INDEX} nor {SINGLE}: no safetensors to prune")


def _header(path: Path) -> dict[str, tuple[tuple[int, ...], int]]:
    """Size and bytes of each tensor of a shard, in the file's own order."""
    if not path.is_file():
        raise LeanMoeError(f"shard {path.name} of the checkpoint is missing")
    tensors, start = read_header(path)
    size = path.stat().st_size
    end = max((each["data_offsets"][1] for each in tensors.values()), default=0)
    if size != start + end:
        raise LeanMoeError(
            f"shard {path.name} is truncated or damaged: {size} bytes where {start + end} are said"
        )
    return {
        name: (tuple(each["shape"]), each["data_offsets"][1] - each["data_offsets"][0])
        for name, each in tensors.items()
    }


def _check_family(shape: MoEShape) -> None:
    if shape.hash_layers or shape.router.zero_experts:
        what = "experts that a table picks by token id" if shape.hash_layers else "identity experts"
        raise LeanMoeError(
            f"{shape.model_type} has {what}: a checkpoint with fewer experts cannot be written; "
            "set --as-plan"
        )


def _check_kept(kept: Kept, shape: MoEShape) -> None:
    _check_family(shape)
    if len(kept) != len(shape.moe_layers):
        raise LeanMoeError(f"{len(kept)} layers' experts for {len(shape.moe_layers)} MoE layers")
    counts = sorted({len(experts) for experts in kept})
    if len(counts) != 1:
        raise LeanMoeError(
            f"layers keep {counts[0]} to {counts[-1]} experts: a checkpoint has one "
            "number for all layers; write a plan instead"
        )
    check_count(counts[0], shape)
    groups = shape.router.groups
    size = shape.experts // groups
    for layer, experts in enumerate(kept):
        each = [sum(e // size == g for e in experts) for g in range(groups)]
        if len(set(each)) != 1 or list(experts) != sorted(set(experts)):
            raise LeanMoeError(
                f"MoE layer {layer} keeps {each} experts of its {groups} groups: they must be equal"
            )


def _fingerprint(source: Source) -> str:
    """The digest of the source's files by name, size and time: a run ends at another source."""
    text = [
        f"{file} {(info := (source.folder / file).stat()).st_size} {info.st_mtime_ns}"
        for file in sorted(source.shards)
    ]
    return hashlib.sha256("\n".join(text).encode()).hexdigest()


def check_output(output: Path, source: Source) -> None:
    """Raises LeanMoeError for an output that holds something else than an unfinished run."""
    if output.resolve() == source.folder.resolve():
        raise LeanMoeError(f"output {output} is the source itself")
    is_free = not output.exists() or (output.is_dir() and not any(output.iterdir()))
    if not is_free and not (output / STATE).is_file():
        raise LeanMoeError(f"output {output} exists and is not empty: give another folder")


def _claim(
    output: Path, state: Mapping[str, Any], source: Source, sizes: Mapping[str, int]
) -> None:
    """Makes the output folder ours, or finds that it is already; `sizes` are the shards' bytes."""
    check_output(output, source)
    if (output / STATE).is_file() and read_json(output / STATE, "earlier state") != dict(state):
        raise LeanMoeError(
            f"output {output} holds an unfinished run with other settings: remove it first"
        )
    _require_space(output, sizes)
    write_json(output / STATE, dict(state))


def _require_space(output: Path, sizes: Mapping[str, int]) -> None:
    needed = sum(size for file, size in sizes.items() if not (output / file).is_file())
    existing = next(p for p in (output, *output.resolve().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise LeanMoeError(
            f"the pruned checkpoint needs {size_text(needed)} in {output}, "
            f"where {size_text(free)} are free"
        )


def _wanted(names: tuple[str, ...], source: Source, chosen: Chosen) -> dict[str, str]:
    """Tensors of a shard that remain: new name to old."""
    found = {}
    for name in names:
        part = source.parts.get(name)
        stack, layer = stack_and_layer(name)
        if is_of_head(name) or (layer >= source.shape.layers and stack == source.stack):
            continue
        if part is None or part.expert is None or part.decoder_index not in chosen:
            found[name] = name
        elif part.expert in chosen[part.decoder_index]:
            found[renumbered(name, chosen[part.decoder_index].index(part.expert))] = name
    return found


def _new_bytes(name: str, source: Source, chosen: Chosen) -> int:
    part = source.parts.get(name)
    if part is None or part.kind == "numbered" or part.decoder_index not in chosen:
        return source.bytes[name]
    return source.bytes[name] * len(chosen[part.decoder_index]) // source.shape.experts


def _write_shard(
    path: Path,
    output: Path,
    wanted: Mapping[str, str],
    source: Source,
    chosen: Chosen,
) -> None:
    try:
        with safe_open(path, "pt") as shard:
            tensors = {
                new: _sliced(shard, old, source.parts.get(old), chosen)
                for new, old in wanted.items()
            }
            metadata = shard.metadata()
    except SafetensorError as error:
        raise LeanMoeError(f"shard {path.name} cannot be read: {error}") from error
    try:
        write_with(output, lambda temporary: save_file(tensors, temporary, metadata=metadata))
    except SafetensorError as error:
        raise LeanMoeError(f"cannot write {output}: {error}") from error


def _sliced(shard: Any, name: str, part: TensorPart | None, chosen: Chosen) -> Tensor:
    if part is None or part.kind == "numbered" or part.decoder_index not in chosen:
        whole: Tensor = shard.get_tensor(name)
        return whole
    experts = chosen[part.decoder_index]
    if part.kind == "last_axis":
        return shard.get_tensor(name)[..., list(experts)].contiguous()  # type: ignore[no-any-return]
    rows = shard.get_slice(name)  # row by row: the whole tensor may be larger than memory
    return torch.cat([rows[expert : expert + 1] for expert in experts])


def _quantisation_files(folder: Path, chosen: Chosen) -> dict[str, Any]:
    """Settings in files beside the config, by name, under the experts' new numbers."""
    files = (path for path in sorted(folder.iterdir()) if is_settings_file(path.name))
    read = {path.name: read_json(path, "quantisation settings") for path in files}
    return {name: renumbered_settings(value, chosen) for name, value in read.items()}


def _copy_others(source: Path, output: Path) -> None:
    """Tokenizer, generation settings and the like: every file that is not weights or the config."""
    for path in sorted(source.iterdir()):
        is_weights = path.suffix in (".safetensors", ".bin", ".pt", ".pth", ".gguf")
        if not path.is_file() or is_weights or path.name in (FILE, INDEX, RECORD, STATE):
            continue
        if path.name.startswith(".") or path.name.endswith(".index.json"):
            continue
        write_with(output / path.name, partial(shutil.copyfile, path))
