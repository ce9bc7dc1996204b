"""The one artefact: what a model may activate, per load band and MoE layer, as a small JSON file.

Needs no torch. A plan is a list of levels, from the most careful to the fastest. A level is a list
of bands, each for a range of tokens in a forward step, each holding one rule per MoE layer, and
rules of their own for prompt tokens. Nothing set means the model as it was trained.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, ClassVar

from leanmoe.core.errors import LeanMoeError, shown, unknown_name
from leanmoe.core.proof import LevelProof
from leanmoe.core.schema import ALWAYS_STORED, StoredFile, fields_from_json, fields_to_json
from leanmoe.models.shape import Fingerprint, read_shape

ONLY = "lean"
"""The name of a plan's only level where nobody named it, as in files of schema 1."""
AS_TRAINED = ("full", "stock", "strict", "trained")
"""What level 0, the model as it was trained, is called in places: no name for another."""
LEVEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9.%_-]{0,31}")
""" "." and ".." are paths, and "-x" is an option."""


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
class Level:
    """What a model may activate at one loss, by tokens in a forward step, and what proves the loss.

    Bands are ordered by `up_to`; a step larger than the last band runs the full model.

    `prompt` holds rules, one per MoE layer, for prompt tokens: those whose own next-token
    prediction nobody reads, so that a step needs only what later tokens will attend to. A rule
    there may set `top_k` to 0 (no routed expert at all). Where it is empty, prompt tokens fall
    under the bands like any other token; where it is not, they do not count towards a band.
    """

    name: str
    bands: tuple[Band, ...] = field(default=(), metadata=ALWAYS_STORED)
    prompt: tuple[Rule, ...] = field(default=(), metadata=ALWAYS_STORED)
    proof: LevelProof | None = None

    def __post_init__(self) -> None:
        """Raises LeanMoeError for a name that no URL, label or option could hold."""
        if not LEVEL_NAME.fullmatch(self.name):
            raise LeanMoeError(
                f"a level is called {shown(self.name)}: a name is 1 to 32 letters, digits, '.', "
                "'%', '-' or '_', a letter or digit first"
            )
        if self.name.lower() in AS_TRAINED:
            raise LeanMoeError(
                f"a level is called {self.name!r}: {', '.join(AS_TRAINED)} mean the model as it "
                "was trained; give it another name"
            )

    @property
    def rules(self) -> tuple[Rule, ...]:
        """Every rule of every band, then those for prompts."""
        return (*(rule for band in self.bands for rule in band.rules), *self.prompt)

    def band_for(self, tokens: int) -> Band | None:
        """The band of a forward step with this many tokens; None where the level ends below it."""
        return next((b for b in self.bands if b.up_to is None or tokens <= b.up_to), None)

    def check(self, model: Fingerprint, more_experts: bool = False) -> None:
        """Raises LeanMoeError unless bands are in order and every rule is in range for `model`."""
        self._check_bands(model.moe_layers)
        for number, band in enumerate(self.bands):
            for layer, rule in enumerate(band.rules):
                rule.check(model, f"bands[{number}].rules[{layer}]", more_experts)
        if self.prompt and len(self.prompt) != model.moe_layers:
            raise LeanMoeError(
                f"prompt has {len(self.prompt)} rules: the model has {model.moe_layers} MoE layers"
            )
        for layer, rule in enumerate(self.prompt):
            rule.check(model, f"prompt[{layer}]", more_experts, fewest=0)

    def _check_bands(self, layers: int) -> None:
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
            if len(band.rules) != layers:
                raise LeanMoeError(
                    f"bands[{number}] has {len(band.rules)} rules: "
                    f"the model has {layers} MoE layers"
                )


@dataclass(frozen=True)
class Plan(StoredFile):
    """What a model may activate: levels from the most careful to the fastest.

    Level 0 is always the model as it was trained and is not written: a plan without levels is the
    model itself. What asks for `bands`, `prompt` or the rules of a step needs a plan of one level;
    `at` makes it of a plan of several.
    """

    KIND: ClassVar[str] = "leanmoe_plan"
    VERSION: ClassVar[int] = 2
    WHAT: ClassVar[str] = "plan"

    model: Fingerprint
    levels: tuple[Level, ...] = field(default=(), metadata=ALWAYS_STORED)
    provenance: Mapping[str, Any] = field(default_factory=dict, metadata=ALWAYS_STORED)

    @classmethod
    def banded(
        cls, model: Fingerprint, bands: tuple[Band, ...] = (), prompt: tuple[Rule, ...] = ()
    ) -> Plan:
        """A plan of one level, unproven."""
        return cls(model, (Level(ONLY, bands, prompt),))

    @classmethod
    def uniform(cls, model: Fingerprint | str, rule: Rule) -> Plan:
        """The same rule in every MoE layer at every load.

        `model` is a fingerprint, or what `read_shape` takes: a folder, a hub name or "reference".
        """
        if isinstance(model, str):
            model = read_shape(model).fingerprint()
        return cls.per_layer(model, (rule,) * model.moe_layers)

    @classmethod
    def per_layer(cls, model: Fingerprint, rules: tuple[Rule, ...]) -> Plan:
        """One rule per MoE layer, the same at every load."""
        return cls.banded(model, (Band(None, rules),))

    @property
    def level(self) -> Level:
        """The plan's only level, an empty one where it has none.

        Raises LeanMoeError where there are several: which one is the user's choice.
        """
        if len(self.levels) > 1:
            names = ", ".join(level.name for level in self.levels)
            raise LeanMoeError(
                f"the plan has the levels {names}: choose one (--level; in an engine LEANMOE_LEVEL)"
            )
        return self.levels[0] if self.levels else Level(ONLY)

    def at(self, name: str | None) -> Plan:
        """The plan with the level of that name alone; None is for a plan of at most one.

        Raises LeanMoeError for a name that no level has, and for None where there are several.
        """
        if name is None:
            self.level  # noqa: B018 - refuses where there are several
            return self
        for level in self.levels:
            if level.name == name:
                return replace(self, levels=(level,))
        raise unknown_name("the plan's level", name, [level.name for level in self.levels])

    def with_level(self, **changes: Any) -> Plan:
        """The plan with its only level changed; what was proven of it is proven no more."""
        return replace(self, levels=(replace(self.level, proof=None, **changes),))

    @property
    def bands(self) -> tuple[Band, ...]:
        """Those of the only level; see `level`."""
        return self.level.bands

    @property
    def prompt(self) -> tuple[Rule, ...]:
        """The rules for prompts of the only level; see `level`."""
        return self.level.prompt

    @property
    def is_empty(self) -> bool:
        """Whether the plan runs the model as it was trained at every load."""
        return all(rule.is_empty for level in self.levels for rule in level.rules)

    @property
    def has_budget_per_rank(self) -> bool:
        """Whether some rule needs to know on which rank an expert is."""
        rules = (rule for level in self.levels for rule in level.rules)
        return any(rule.budget_per_rank is not None for rule in rules)

    def band_for(self, tokens: int) -> Band | None:
        """`Level.band_for` of the only level."""
        return self.level.band_for(tokens)

    def rules_for(self, tokens: int) -> tuple[Rule, ...]:
        """One rule per MoE layer for a forward step with this many tokens (padding not counted)."""
        band = self.band_for(tokens)
        return band.rules if band else (Rule(),) * self.model.moe_layers

    def check(self, model: Fingerprint, more_experts: bool = False) -> None:
        """Raises LeanMoeError unless the plan was made for `model` and every rule is in range."""
        if (name := self.model.difference(model)) is not None:
            raise LeanMoeError(
                f"this plan was made for another model: its {name} is "
                f"{getattr(self.model, name)}, this model's is {getattr(model, name)}"
            )
        self._check_order()
        for level in self.levels:
            try:
                level.check(model, more_experts)
            except LeanMoeError as error:
                if len(self.levels) == 1:
                    raise
                raise LeanMoeError(f"level {level.name}: {error}") from error

    def _check_order(self) -> None:
        names = [level.name for level in self.levels]
        if twice := [name for name in names if names.count(name) > 1]:
            raise LeanMoeError(f"two levels are called {twice[0]}: each needs a name of its own")
        proofs = [(level.name, level.proof.margin) for level in self.levels if level.proof]
        for (careful, least), (name, margin) in pairwise(proofs):
            if margin.in_nats == least.in_nats and margin.value < least.value:
                raise LeanMoeError(
                    f"level {name} was proven within {margin}, level {careful} before it within "
                    f"{least}: levels go from the most careful to the fastest"
                )

    @classmethod
    def from_json(cls, value: Any, name: str = "") -> Plan:
        """Reads what `to_json` wrote; anything malformed is a LeanMoeError naming the place.

        A file of schema 1 holds the bands and prompt rules of one level at its top.
        """
        levels: tuple[Level, ...] = ()
        if isinstance(value, dict) and value.get(cls.KIND) == 1:
            where, joint = (f"{cls.WHAT} {name}", ": ") if name else (cls.WHAT, ".")
            if "levels" in value:
                raise LeanMoeError(f"{where} has levels: a file of schema 1 has bands and prompt")
            own = {key: value[key] for key in ("bands", "prompt") if key in value}
            levels = (fields_from_json(Level, {"name": ONLY, **own}, where, joint),)
            rest = {key: each for key, each in value.items() if key not in own}
            value = {**rest, "levels": [], cls.KIND: cls.VERSION}
        plan = super().from_json(value, name)
        plan = replace(plan, levels=levels or plan.levels)
        plan.check(plan.model, more_experts=True)
        return plan


@dataclass(frozen=True)
class Rule:
    """What one MoE layer may activate; fields left at None change nothing.

    Fields apply in this order: `experts`, the model's own ranking, `top_k`, `threshold` and
    `top_p`, then `guaranteed`, `budget` and `budget_per_rank`.
    """

    top_k: int | None = None
    """Experts a token may use at most (arXiv 2505.03531)."""
    threshold: float | None = None
    """Drops a slot whose gate is below threshold x the token's best gate (arXiv 2402.14800)."""
    top_p: float | None = None
    """Keeps the smallest prefix reaching this share of the token's top-k gate mass (2403.07652)."""
    guaranteed: int | None = None
    """Each token keeps its best this many; the rest come from everyone's (OEA, 2511.02237)."""
    budget: int | None = None
    """Distinct experts in the step at most, every token's best kept (XShare, 2602.07265)."""
    experts: tuple[int, ...] | None = None
    """The experts that remain; the others are pruned."""
    renormalise: float = 1.0
    """a, 0 to 1: the weights of the slots that run are divided by (their own sum)^a x (the sum of
    the token's whole top-k)^(1 - a). 1 is what the model does with so few experts; 0 keeps each
    weight as it is beside the whole top-k. No effect where a router does not normalise."""
    budget_per_rank: int | None = None
    """Distinct experts in the step at most on each rank of expert parallelism, where the most
    loaded one decides the time; every token's best kept. On one rank it is a `budget`."""

    @property
    def is_empty(self) -> bool:
        """Whether the rule leaves the layer as it was trained."""
        return replace(self, renormalise=1.0) == Rule()

    @property
    def is_batch_aware(self) -> bool:
        """Whether a token's experts depend on the other tokens in its step."""
        return self.guaranteed is not None or self.has_budget

    @property
    def has_budget(self) -> bool:
        """Whether the distinct experts of a step are limited, in all or on each rank."""
        return self.budget is not None or self.budget_per_rank is not None

    def on(self, ranks: int) -> Rule:
        """The rule as that many ranks need it: on one, `budget_per_rank` is a `budget`."""
        if ranks > 1 or self.budget_per_rank is None:
            return self
        budget = min(self.budget_per_rank, self.budget or self.budget_per_rank)
        return replace(self, budget=budget, budget_per_rank=None)

    def check(
        self,
        model: Fingerprint,
        where: str = "rule",
        more_experts: bool = False,
        fewest: int = 1,
    ) -> None:
        """Raises LeanMoeError, naming field, value and range, if the model cannot run it.

        `more_experts` allows a `top_k` above the one the model was trained with; `fewest` is the
        least `top_k` allowed.
        """
        if self.experts is not None:
            _require_experts(where, self.experts, model.experts)
        kept = model.experts if self.experts is None else len(self.experts)
        most = kept if more_experts else min(model.top_k, kept)
        hint = f" ({kept} experts remain)"
        if most < kept:
            hint = f" (the model was trained with {model.top_k})"
        _require_whole(where, "top_k", self.top_k, fewest, most, hint)
        _require_whole(where, "guaranteed", self.guaranteed, 1, self.top_k or most, "")
        _require_whole(where, "budget", self.budget, 1, kept, "")
        _require_whole(where, "budget_per_rank", self.budget_per_rank, 1, kept, "")
        _require_share(where, "threshold", self.threshold)
        _require_share(where, "top_p", self.top_p)
        _require_number(where, "renormalise", self.renormalise)
        if not 0 <= self.renormalise <= 1:
            raise LeanMoeError(f"{where}.renormalise is {self.renormalise}: it must be 0 to 1")
        if self.renormalise < 1 and (self.top_k or 0) > model.top_k:
            raise LeanMoeError(
                f"{where}.renormalise is {self.renormalise} with top_k {self.top_k}: there are no "
                f"weights beyond the model's own {model.top_k} to share in; it must be 1"
            )

    def to_json(self) -> dict[str, Any]:
        """The fields that are set."""
        return fields_to_json(self)

    @classmethod
    def from_json(cls, value: Any, where: str = "rule") -> Rule:
        """Reads what `to_json` wrote; unknown fields and wrong types are refused by name.

        Files that were written before `renormalise` may hold `keep_weights`: true is 0, false 1.
        """
        if isinstance(value, dict) and isinstance(value.get("keep_weights"), bool):
            value = {"renormalise": 1.0 - value["keep_weights"], **value}
            del value["keep_weights"]
        return fields_from_json(cls, value, where)


def _require_whole(
    where: str, name: str, value: int | None, least: int, most: int, hint: str
) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise LeanMoeError(f"{where}.{name} is {shown(value)}: it must be a whole number")
    if not least <= value <= most:
        raise LeanMoeError(f"{where}.{name} is {value}: it must be {least} to {most}{hint}")


def _require_share(where: str, name: str, value: float | None) -> None:
    if value is None:
        return
    _require_number(where, name, value)
    if not 0 < value <= 1:
        raise LeanMoeError(f"{where}.{name} is {value}: it must be above 0 and at most 1")


def _require_number(where: str, name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise LeanMoeError(f"{where}.{name} is {shown(value)}: it must be a number")


def _require_experts(where: str, experts: tuple[int, ...], count: int) -> None:
    if not experts:
        raise LeanMoeError(f"{where}.experts is empty: at least one expert must remain")
    if len(set(experts)) != len(experts):
        raise LeanMoeError(f"{where}.experts names an expert twice")
    if outside := [e for e in experts if not 0 <= e < count]:
        raise LeanMoeError(f"{where}.experts names {outside[0]}: it must be 0 to {count - 1}")
