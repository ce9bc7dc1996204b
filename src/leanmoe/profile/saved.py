"""A profile: what a model's router did on real text, as two files. Needs no torch.

`profile.json` holds what a reader wants (shares, curves, provenance); `profile.safetensors` the
counts behind it and a sample of router logits to replay.

Letters: L MoE layers, T traced tokens, E experts, K slots a token (top-k).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from leanmoe.core.errors import LeanMoeError
from leanmoe.core.files import read_json, write_json, write_with
from leanmoe.models.families import Router
from leanmoe.plan import Fingerprint

SCHEMA_VERSION = 2
JSON_NAME = "profile.json"
ARRAYS_NAME = "profile.safetensors"


@dataclass(frozen=True)
class Distinct:
    """Mean distinct experts in decode steps of `tokens` tokens, from `documents` documents each."""

    tokens: int
    documents: int
    measured: float
    error: float
    """Standard error of `measured`, over the steps that were drawn."""
    uniform: float
    """What the formula for evenly used experts says."""


@dataclass(frozen=True)
class Trace:
    """Router logits of sampled tokens, document by document, each document's tokens together."""

    logits_LTE: NDArray[np.float16]
    document_T: NDArray[np.int32]
    position_T: NDArray[np.int32]
    """Place of the token in its window."""

    @property
    def tokens(self) -> int:
        """Tokens sampled."""
        return len(self.document_T)

    @property
    def documents(self) -> int:
        """Documents they are from."""
        return len(np.unique(self.document_T))


@dataclass(frozen=True)
class Profile:
    """What a model's router does on some text."""

    model: Fingerprint
    router: Router
    decoder_indices: tuple[int, ...]
    """The decoder layer that each MoE layer is in."""
    tokens: int
    documents: int
    use_LE: NDArray[np.int64]
    """Tokens that chose each expert."""
    mass_LK: NDArray[np.float64]
    """Mean share of a token's gates that its best j carry, j = 1..k, as the model ranks them."""
    distinct: tuple[tuple[Distinct, ...], ...]
    """Per layer, by rising batch size."""
    trace: Trace
    bias_LE: NDArray[np.float32] | None = None
    """The routers' ranking biases, where the family has them."""
    provenance: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    def to_json(self) -> dict[str, Any]:
        """What a reader wants, without counts and trace; the "profile" part of result files."""
        return {
            "label": "measured",
            "tokens": self.tokens,
            "documents": self.documents,
            "layers": [
                {
                    "layer": number,
                    "decoder_layer": self.decoder_indices[number],
                    "use": (use_E / use_E.sum()).tolist(),
                    "mass": self.mass_LK[number].tolist(),
                    "distinct": [asdict(point) for point in self.distinct[number]],
                }
                for number, use_E in enumerate(self.use_LE)
            ],
        }

    def save(self, folder: Path) -> None:
        """Writes both files into `folder`, each whole or not at all."""
        from safetensors.numpy import save

        arrays = save(self._arrays())
        write_with(folder / ARRAYS_NAME, lambda path: path.write_bytes(arrays))
        stored = {
            "leanmoe_profile": SCHEMA_VERSION,
            "model": asdict(self.model),
            "router": asdict(self.router),
            "arrays": {"file": ARRAYS_NAME, "sha256": hashlib.sha256(arrays).hexdigest()},
            "profile": self.to_json(),
            "provenance": dict(self.provenance),
        }
        write_json(folder / JSON_NAME, stored)

    @classmethod
    def load(cls, folder: Path) -> Profile:
        """Reads what `save` wrote; LeanMoeError if it is damaged or from two different runs."""
        from safetensors import SafetensorError
        from safetensors.numpy import load

        stored = read_json(folder / JSON_NAME, "profile")
        version = stored.get("leanmoe_profile") if isinstance(stored, dict) else None
        if version != SCHEMA_VERSION:
            raise LeanMoeError(
                f"profile {folder / JSON_NAME} has schema version {version!r}: "
                f"this leanmoe reads {SCHEMA_VERSION}"
            )
        try:
            content = (folder / ARRAYS_NAME).read_bytes()
        except OSError as error:
            raise LeanMoeError(
                f"cannot read profile {folder / ARRAYS_NAME}: {error.strerror}"
            ) from error
        try:
            if hashlib.sha256(content).hexdigest() != stored["arrays"]["sha256"]:
                raise LeanMoeError(
                    f"profile {folder}: {ARRAYS_NAME} is not the one that {JSON_NAME} was saved "
                    "with; profile again"
                )
            return cls._from_saved(stored, load(content))
        except (KeyError, TypeError, ValueError, IndexError, SafetensorError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise LeanMoeError(f"profile {folder} is damaged ({reason}); profile again") from error

    @classmethod
    def _from_saved(cls, stored: Mapping[str, Any], arrays: Mapping[str, Any]) -> Profile:
        shown = stored["profile"]
        model = Fingerprint(**stored["model"])
        _require_shapes(model, len(shown["layers"]), arrays)
        return cls(
            model=model,
            router=Router(**stored["router"]),
            decoder_indices=tuple(layer["decoder_layer"] for layer in shown["layers"]),
            tokens=shown["tokens"],
            documents=shown["documents"],
            use_LE=arrays["use_LE"],
            mass_LK=arrays["mass_LK"],
            distinct=tuple(
                tuple(Distinct(**point) for point in layer["distinct"]) for layer in shown["layers"]
            ),
            trace=Trace(arrays["logits_LTE"], arrays["document_T"], arrays["position_T"]),
            bias_LE=arrays.get("bias_LE"),
            provenance=stored["provenance"],
        )

    def _arrays(self) -> dict[str, NDArray[Any]]:
        bias = {} if self.bias_LE is None else {"bias_LE": self.bias_LE}
        return {
            **bias,
            "use_LE": self.use_LE,
            "mass_LK": self.mass_LK,
            "logits_LTE": self.trace.logits_LTE,
            "document_T": self.trace.document_T,
            "position_T": self.trace.position_T,
        }


def _require_shapes(model: Fingerprint, shown: int, arrays: Mapping[str, Any]) -> None:
    """Raises ValueError unless the arrays are those of such a model."""
    layers, experts = model.moe_layers, model.experts
    if shown != layers:
        raise ValueError(f"{shown} layers are shown, the model has {layers}")
    tokens = len(arrays["document_T"])
    wanted = {
        "use_LE": (layers, experts),
        "mass_LK": (layers, model.top_k),
        "logits_LTE": (layers, tokens, experts),
        "position_T": (tokens,),
        **({"bias_LE": (layers, experts)} if "bias_LE" in arrays else {}),
    }
    for name, shape in wanted.items():
        if arrays[name].shape != shape:
            raise ValueError(f"{name} is {arrays[name].shape}, not {shape}")
