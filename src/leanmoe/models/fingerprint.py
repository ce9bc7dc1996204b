"""Which model a plan or a profile was made for. Needs no torch."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass

HEAD = re.compile(r"(Sparse|Thinker|Text)?For[A-Z]\w*$")
"""What a class name says of the model's head and of what is around the language model."""
SAME = {"hunyuanv1moe": "hunyuanmoev1", "minimaxm3vl": "minimaxm3"}
"""Model types whose classes are called otherwise."""


@dataclass(frozen=True)
class Fingerprint:
    """The model a plan was made for; a plan is refused on any other."""

    architecture: str
    layers: int
    moe_layers: int
    experts: int
    top_k: int

    def difference(self, other: Fingerprint) -> str | None:
        """The first field in which `other` is another model; None where it is the same one.

        A multimodal model and its language model loaded by itself have classes of their own
        (Qwen3_5MoeForConditionalGeneration, Qwen3_5MoeForCausalLM), and a config.json without
        `architectures` has its model type here: these are the same model.
        """
        for name, value in asdict(self).items():
            theirs = getattr(other, name)
            if name == "architecture":
                value, theirs = _language_model(value), _language_model(theirs)
            if value != theirs:
                return name
        return None


def _language_model(architecture: str) -> str:
    """The name that a class, its relatives with other heads and the model type have in common."""
    name = HEAD.sub("", architecture).lower().replace("_", "").replace("-", "")
    name = name.removesuffix("text")
    return SAME.get(name, name)
