"""The one artefact: what a model may activate, per load band and MoE layer, as a small JSON file.

Needs no torch. A plan is a list of bands, each for a range of tokens in a forward step, each
holding one rule per MoE layer, and rules of their own for prompt tokens. Nothing set means the
model as it was trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

from leanmoe.core.errors import LeanMoeError
from leanmoe.core.files import read_json, write_json
from leanmoe.models.fingerprint import Fingerprint
from leanmoe.plan.rule import Rule, require_keys, require_type

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Band:
    """The rules for forward steps of at most `up_to` tokens; `up_to=None` has no upper end."""

    up_to: int | None
    rules: tuple[Rule, ...]

    @property
    def is_empty(self) -> bool:
        """Whether the band runs the model as it was trained."""
        return all(rule.is_empty for rule in self.rules)


@dataclass(frozen=True)
class Plan:
    """What a model may activate, by tokens in a forward step. Empty bands: the model itself.

    Bands are ordered by `up_to`; a step larger than the last band runs the full model.

    `prompt` holds rules, one per MoE layer, for prompt tokens: those whose own next-token
    prediction nobody reads, so that a step needs only what later tokens will attend to. A rule
    there may set `top_k` to 0 (no routed expert at all). Where it is empty, prompt tokens fall
    under the bands like any other token; where it is not, they do not count towards a band.
    """

    model: Fingerprint
    bands: tuple[Band, ...] = ()
    prompt: tuple[Rule, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    @classmethod
    def uniform(cls, model: Fingerprint, rule: Rule) -> Plan:
        """The same rule in every MoE layer at every load."""
        return cls(model, (Band(None, (rule,) * model.moe_layers),))

    @classmethod
    def per_layer(cls, model: Fingerprint, rules: tuple[Rule, ...]) -> Plan:
        """One rule per MoE layer, the same at every load."""
        return cls(model, (Band(None, rules),))

    @property
    def is_empty(self) -> bool:
        """Whether the plan runs the model as it was trained at every load."""
        bands = all(band.is_empty for band in self.bands)
        return bands and all(rule.is_empty for rule in self.prompt)

    @property
    def has_budget_per_rank(self) -> bool:
        """Whether some rule needs to know on which rank an expert is."""
        rules = [*self.prompt, *(rule for band in self.bands for rule in band.rules)]
        return any(rule.budget_per_rank is not None for rule in rules)

    def band_for(self, tokens: int) -> Band | None:
        """The band of a forward step with this many tokens; None where the plan ends below it."""
        return next((b for b in self.bands if b.up_to is None or tokens <= b.up_to), None)

    def rules_for(self, tokens: int) -> tuple[Rule, ...]:
        """One rule per MoE layer for a forward step with this many tokens (padding not counted)."""
        band = self.band_for(tokens)
        return band.rules if band else (Rule(),) * self.model.moe_layers

    def check(self, model: Fingerprint, more_experts: bool = False) -> None:
        """Raises LeanMoeError unless the plan was made for `model` and every rule is in range."""
        for name, planned in asdict(self.model).items():
            found = getattr(model, name)
            if planned != found:
                raise LeanMoeError(
                    f"this plan was made for another model: its {name} is {planned}, "
                    f"this model's is {found}"
                )
        self._check_bands()
        for number, band in enumerate(self.bands):
            for layer, rule in enumerate(band.rules):
                rule.check(model, f"bands[{number}].rules[{layer}]", more_experts)
        if self.prompt and len(self.prompt) != self.model.moe_layers:
            raise LeanMoeError(
                f"prompt has {len(self.prompt)} rules: "
                f"the model has {self.model.moe_layers} MoE layers"
            )
        for layer, rule in enumerate(self.prompt):
            rule.check(model, f"prompt[{layer}]", more_experts, fewest=0)

    def _check_bands(self) -> None:
        previous = 0
        for number, band in enumerate(self.bands):
            if band.up_to is None and number != len(self.bands) - 1:
                raise LeanMoeError(
                    f"bands[{number}].up_to is null: only the last band may be without an end"
                )
            if band.up_to is not None and band.up_to <= previous:
                raise LeanMoeError(
                    f"bands[{number}].up_to is {band.up_to}: it must be above {previous}"
                )
            previous = band.up_to or previous
            if len(band.rules) != self.model.moe_layers:
                raise LeanMoeError(
                    f"bands[{number}] has {len(band.rules)} rules: "
                    f"the model has {self.model.moe_layers} MoE layers"
                )

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON values, with its schema version."""
        return {
            "leanmoe_plan": SCHEMA_VERSION,
            "model": asdict(self.model),
            "bands": [
                {"up_to": band.up_to, "rules": [rule.to_json() for rule in band.rules]}
                for band in self.bands
            ],
            "prompt": [rule.to_json() for rule in self.prompt],
            "provenance": dict(self.provenance),
        }

    @classmethod
    def from_json(cls, value: Any) -> Plan:
        """Reads what `to_json` wrote; anything malformed is a LeanMoeError naming the place."""
        version = value.get("leanmoe_plan") if isinstance(value, dict) else SCHEMA_VERSION
        if version != SCHEMA_VERSION:
            raise LeanMoeError(
                f"plan has schema version {version!r}: this leanmoe reads {SCHEMA_VERSION}"
            )
        require_keys(value, {"leanmoe_plan", "model", "bands", "prompt", "provenance"}, "plan")
        model = _fingerprint_from_json(value.get("model"))
        bands = value.get("bands")
        if not isinstance(bands, list):
            raise LeanMoeError(f"plan.bands is {bands!r}: it must be a list of bands")
        provenance = value.get("provenance", {})
        if not isinstance(provenance, dict):
            raise LeanMoeError(f"plan.provenance is {provenance!r}: it must be an object")
        prompt = value.get("prompt", [])
        if not isinstance(prompt, list):
            raise LeanMoeError(f"plan.prompt is {prompt!r}: it must be a list of rules")
        plan = cls(
            model,
            tuple(_band_from_json(b, n) for n, b in enumerate(bands)),
            tuple(Rule.from_json(rule, f"prompt[{n}]") for n, rule in enumerate(prompt)),
            provenance,
        )
        plan.check(model, more_experts=True)
        return plan

    def save(self, path: Path) -> None:
        """Writes the plan, whole or not at all."""
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Reads and validates a plan file."""
        return cls.from_json(read_json(path, "plan"))


def _band_from_json(value: Any, number: int) -> Band:
    where = f"bands[{number}]"
    require_keys(value, {"up_to", "rules"}, where)
    require_type(value.get("up_to"), (int,), f"{where}.up_to", "a number of tokens or null")
    rules = value.get("rules")
    if not isinstance(rules, list):
        raise LeanMoeError(f"{where}.rules is {rules!r}: it must be a list of rules")
    return Band(
        value.get("up_to"),
        tuple(Rule.from_json(rule, f"{where}.rules[{n}]") for n, rule in enumerate(rules)),
    )


def _fingerprint_from_json(value: Any) -> Fingerprint:
    names = [f.name for f in fields(Fingerprint)]
    require_keys(value, set(names), "plan.model")
    for name in names:
        wanted = (str,) if name == "architecture" else (int,)
        kind = "a name" if name == "architecture" else "a whole number"
        if value.get(name) is None:
            raise LeanMoeError(f"plan.model.{name} is missing: it must be {kind}")
        require_type(value[name], wanted, f"plan.model.{name}", kind)
    return Fingerprint(**value)
