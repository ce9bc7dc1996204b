"""A model's config.json: where it is found, and its settings read one by one, each validated.

Needs no torch. Multimodal models keep their language model's settings in a part of its own; that
part is what is read.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from leanmoe.core.errors import LeanMoeError, first_line, shown
from leanmoe.core.files import read_json
from leanmoe.models.reference import NAME, folder_of

FILE = "config.json"
MODELOPT_FILE = "hf_quant_config.json"
"""ModelOpt's settings; its older versions write nothing in config.json."""
TEXT_PARTS = ("text_config", "llm_config", "language_config", "thinker_config")
"""Where multimodal models keep their language model's settings; may be nested."""
INHERITED = (
    "architectures", "quantization_config", "quantization", "compression_config",
    "tie_word_embeddings", "dtype", "torch_dtype",
)  # fmt: skip
"""Settings of the whole model that a language model's part takes over."""
NAMES: Mapping[str, tuple[str, ...]] = {
    "num_hidden_layers": ("num_layers",),
    "num_experts": (
        "n_routed_experts", "num_local_experts", "moe_num_experts", "num_routed_experts",
    ),
    "num_experts_per_tok": (
        "num_experts_per_token", "experts_per_token", "moe_k", "moe_topk", "moe_top_k",
        "top_k_experts",
    ),
    "moe_latent_size": ("routed_expert_hidden_size", "moe_hidden_size"),
    "n_shared_experts": ("num_shared_experts", "num_shared_expert", "moe_num_shared_experts"),
    "norm_topk_prob": ("moe_renormalize",),
    "routed_scaling_factor": ("route_scale", "router_scaling_factor", "moe_router_scaling_factor"),
    "n_group": ("num_expert_group",),
    "first_k_dense_replace": ("num_dense_layers", "moe_layer_start_index"),
    "num_key_value_heads": ("num_attention_groups",),
    "share_expert_dim": ("share_expert_dims",),
    "layer_types": ("layers_block_type",),
    "sliding_window_pattern": ("global_attn_every_n_layers",),
    "sliding_window": ("sliding_window_size",),
    "full_attention_interval": ("layer_group_size",),
    "linear_conv_kernel_dim": ("short_conv_kernel_size",),
    "quantization_config": ("quantization", "compression_config"),
}  # fmt: skip
"""One setting, and the names it goes by in one family or another."""
MOST = 10**12
"""Above any setting of a model; beyond it sizes are no longer numbers that a computer adds up."""
LAYER_LETTERS = {"M": "linear_attention", "*": "full_attention", "E": "moe", "-": "mlp"}
"""Nemotron-H's published pattern of layers, one letter each."""


class HfConfig:
    """The settings of one language model, by whichever of their names its config.json uses.

    A setting that is absent takes the family's default; null and absent are the same after that.
    Every reader raises LeanMoeError, naming the key, its value and what is allowed.
    """

    def __init__(self, values: Mapping[str, Any], defaults: Mapping[str, Any] | None = None):
        self.values = values
        self.defaults = defaults or {}

    def named(self, name: str) -> str:
        """The name under which the config has the setting, or its first name."""
        return next((n for n in (name, *NAMES.get(name, ())) if n in self.values), name)

    def raw(self, name: str) -> Any:
        """The setting as it stands in the file, or the family's default, or None."""
        named = self.named(name)
        return self.values[named] if named in self.values else self.defaults.get(name)

    def whole(self, name: str, default: int | None = None, least: int = 0, most: int = MOST) -> int:
        """A whole number from `least` to `most`; without `default` the setting is required."""
        given = self._one(name)
        value: Any = default if given is None else given
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self._wrong(name, value, f"a whole number, {least} or more")
        if value > most:
            raise self._wrong(name, value, f"a whole number, at most {most:,}")
        return value

    def number(self, name: str, default: float) -> float:
        """A number above 0."""
        value = self._one(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= MOST:
            raise self._wrong(name, value, f"a number above 0, at most {MOST:,}")
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        """True or false."""
        value = self.raw(name)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise self._wrong(name, value, "true or false")
        return value

    def word(self, name: str, default: str, allowed: tuple[str, ...]) -> str:
        """One of the `allowed` words."""
        value = self.raw(name)
        value = default if value is None else value
        if value not in allowed:
            raise self._wrong(name, value, " or ".join(allowed))
        return str(value)

    def items(self, name: str, kind: type, length: int | None = None) -> tuple[Any, ...] | None:
        """A list of `kind`, of `length` items where that is given; None where there is none."""
        value = self.raw(name)
        if value is None:
            return None
        wanted = f"a list of {'words' if kind is str else 'whole numbers'}"
        if not isinstance(value, list | tuple) or not all(isinstance(v, kind) for v in value):
            raise self._wrong(name, value, wanted)
        if kind is int and (out := [v for v in value if not 0 <= v <= MOST]):
            raise self._wrong(name, out[0], f"{wanted}, each from 0 to {MOST:,}")
        if length is not None and len(value) < length:
            raise self._wrong(name, value, f"{wanted}, one for each of {length} layers")
        return tuple(value if length is None else value[:length])

    def part(self, name: str) -> HfConfig:
        """Settings of a part of their own; empty where there is none."""
        value = self.raw(name)
        if value is not None and not isinstance(value, Mapping):
            raise self._wrong(name, value, "an object")
        return HfConfig(value or {})

    def _one(self, name: str) -> Any:
        """A setting that may be a list with one value for each layer, the same in all that have it.

        Zeros are layers without. Raises LeanMoeError where layers differ.
        """
        value = self.raw(name)
        if not isinstance(value, list | tuple) or not value:
            return value
        each = [one for one in value if one not in (None, 0)] or list(value)
        if any(one != each[0] for one in each):
            raise LeanMoeError(
                f"{FILE}: {self.named(name)} differs from layer to layer "
                f"({shown(each[0])}, {shown(next(one for one in each if one != each[0]))}, ...): "
                "it must be the same in all layers"
            )
        return each[0]

    def _wrong(self, name: str, value: Any, wanted: str) -> LeanMoeError:
        found = "missing" if value is None else shown(value)
        others = f" (or {', '.join(NAMES[name])})" if value is None and name in NAMES else ""
        return LeanMoeError(f"{FILE}: {self.named(name)}{others} is {found}: it must be {wanted}")


def language_part(config: Mapping[str, Any]) -> dict[str, Any]:
    """The language model's settings, with what it takes over from a model around it."""
    for name in TEXT_PARTS:
        part = config.get(name)
        if isinstance(part, Mapping):
            inherited = {key: config[key] for key in INHERITED if config.get(key) is not None}
            kind = {"model_type": part.get("model_type") or config.get("model_type")}
            return language_part({**part, **inherited, **kind})
    pattern = config.get("hybrid_override_pattern")
    if isinstance(pattern, str) and set(pattern) <= set(LAYER_LETTERS):
        return {"layer_types": [LAYER_LETTERS[letter] for letter in pattern], **config}
    return dict(config)


COUNT_OF_EXPERTS = re.compile(r"(^|_)(num|n|number)_(\w+_)?experts?$|experts?_num$")
"""What a count of experts is called in whichever family; none is one of experts a token."""


def has_experts(config: Mapping[str, Any]) -> bool:
    """Whether a config.json counts more than one expert anywhere, in a part of its own too."""
    for key, value in config.items():
        if isinstance(value, Mapping) and has_experts(value):
            return True
        most = max(value, default=0, key=_whole) if isinstance(value, list | tuple) else value
        if COUNT_OF_EXPERTS.search(key) and _whole(most) > 1:
            return True
    return False


def _whole(value: Any) -> int:
    return value if isinstance(value, int) else 0


def setting_path(config: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """The keys that lead to a setting of the language model in a config.json."""
    for part in TEXT_PARTS:
        if isinstance(config.get(part), Mapping):
            return (part, *setting_path(config[part], name))
    return (HfConfig(config).named(name),)


def config_path(source: str) -> Path:
    """Where the config.json of a folder, a file, "reference" or a name on the Hugging Face Hub is.

    A hub name is looked for in the local cache first; going to the network is said on standard
    error. Raises LeanMoeError where there is none.
    """
    local = Path(folder_of(source)).expanduser()
    if source and local.is_dir():
        local = local / FILE
        if not local.is_file():
            raise LeanMoeError(f"folder {source} has no {FILE}: it is not a model's folder")
    if local.is_file():
        return local
    if not _is_hub_name(source):
        raise LeanMoeError(
            f"model {source!r} does not exist: give a folder, a {FILE}, owner/name on the "
            f"Hugging Face Hub, or {NAME}"
        )
    return _from_hub(source)


def read_config(source: str) -> dict[str, Any]:
    """The config.json that `config_path` says, with ModelOpt's own file beside it where it counts.

    Raises LeanMoeError where there is none, or where it is not a JSON object.
    """
    path = config_path(source)
    config = read_json(path, "config")
    if not isinstance(config, dict):
        raise LeanMoeError(f"config {path} is not a JSON object")
    beside = path.parent / MODELOPT_FILE
    if config.get("quantization_config") is None and beside.is_file():
        quantised = read_json(beside, "config")
        if isinstance(quantised, dict):
            config["quantization_config"] = {"quant_method": "modelopt", **quantised}
    return config


def _is_hub_name(source: str) -> bool:
    return source.count("/") == 1 and source[0] not in "./~" and not source.endswith((".json", "/"))


def _from_hub(name: str) -> Path:
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.constants import HF_HUB_OFFLINE
        from huggingface_hub.errors import LocalEntryNotFoundError
    except ImportError as error:
        raise LeanMoeError(
            f"model {name} is no local folder; to look on the Hugging Face Hub, "
            "pip install 'leanmoe[tune]'"
        ) from error
    try:
        return Path(hf_hub_download(name, FILE, local_files_only=True))
    except LocalEntryNotFoundError as error:
        if HF_HUB_OFFLINE:
            raise LeanMoeError(
                f"model {name} is no local folder and not in the local cache, "
                "and HF_HUB_OFFLINE forbids the network"
            ) from error
    except Exception as error:  # an invalid name: the client raises its own kind
        raise LeanMoeError(f"model {name}: {first_line(error)}") from error
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    print(
        f"leanmoe: fetching {FILE} of {name} from {endpoint} (without a network: half a minute)",
        file=sys.stderr,
    )
    try:
        with _no_warnings("huggingface_hub"):
            return Path(hf_hub_download(name, FILE))
    except LocalEntryNotFoundError as error:
        raise LeanMoeError(
            f"model {name} is no local folder, and {endpoint} cannot be reached to look for it"
        ) from error
    except Exception as error:  # not found, gated, no network: the client raises many kinds
        raise LeanMoeError(
            f"model {name} is no local folder and its {FILE} could not be fetched: "
            f"{first_line(error)}"
        ) from error


@contextmanager
def _no_warnings(library: str) -> Iterator[None]:
    """Without its lines about each try: what became of them all is said once, at the end."""
    logger = logging.getLogger(library)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
