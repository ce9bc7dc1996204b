"""What one MoE layer may activate, and the checks of its fields."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from leanmoe.core.errors import LeanMoeError
from leanmoe.models.fingerprint import Fingerprint


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
    keep_weights: bool | None = None
    """True: experts weigh what they weigh beside all of the token's own top-k, although fewer run.
    Not set: weights are normalised anew over those that run, as the model does with so few."""
    budget_per_rank: int | None = None
    """Distinct experts in the step at most on each rank of expert parallelism, where the most
    loaded one decides the time; every token's best kept. On one rank it is a `budget`."""

    @property
    def is_empty(self) -> bool:
        """Whether the rule leaves the layer as it was trained."""
        return replace(self, keep_weights=None) == Rule()

    @property
    def depends_on_company(self) -> bool:
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
        """Raises LeanMoeError, naming field, value and range, if the model cannot honour it.

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
        if self.keep_weights and (self.top_k or 0) > model.top_k:
            raise LeanMoeError(
                f"{where}.keep_weights is true with top_k {self.top_k}: there are no weights to "
                f"keep beyond the model's own {model.top_k}"
            )

    def to_json(self) -> dict[str, Any]:
        """The fields that are set."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
            if value is not None
        }

    @classmethod
    def from_json(cls, value: Any, where: str = "rule") -> Rule:
        """Reads what `to_json` wrote; unknown fields and wrong types are refused by name."""
        require_keys(value, {f.name for f in fields(cls)}, where)
        for name in ("top_k", "guaranteed", "budget", "budget_per_rank"):
            require_type(value.get(name), (int,), f"{where}.{name}", "a whole number")
        for name in ("threshold", "top_p"):
            require_type(value.get(name), (int, float), f"{where}.{name}", "a number")
        require_type(value.get("experts"), (list,), f"{where}.experts", "a list of expert ids")
        keep = value.get("keep_weights")
        if keep is not None and not isinstance(keep, bool):
            raise LeanMoeError(f"{where}.keep_weights is {keep!r}: it must be true or false")
        experts = value.get("experts")
        if experts is not None:
            for expert in experts:
                require_type(expert, (int,), f"{where}.experts", "a list of expert ids")
        return cls(**{**value, "experts": None if experts is None else tuple(experts)})


def require_keys(value: Any, allowed: set[str], where: str) -> None:
    """Raises LeanMoeError unless `value` is an object of fields that are `allowed`."""
    if not isinstance(value, dict):
        raise LeanMoeError(f"{where} is {value!r}: it must be an object")
    if unknown := sorted(set(value) - allowed):
        raise LeanMoeError(
            f"{where} has an unknown field {unknown[0]!r}: allowed are {', '.join(sorted(allowed))}"
        )


def require_type(value: Any, types: tuple[type, ...], where: str, wanted: str) -> None:
    """Raises LeanMoeError unless `value` is None or of one of the `types`."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, types)):
        raise LeanMoeError(f"{where} is {value!r}: it must be {wanted}")


def _require_whole(
    where: str, name: str, value: int | None, least: int, most: int, hint: str
) -> None:
    require_type(value, (int,), f"{where}.{name}", "a whole number")
    if value is not None and not least <= value <= most:
        raise LeanMoeError(f"{where}.{name} is {value}: it must be {least} to {most}{hint}")


def _require_share(where: str, name: str, value: float | None) -> None:
    require_type(value, (int, float), f"{where}.{name}", "a number")
    if value is not None and not 0 < value <= 1:
        raise LeanMoeError(f"{where}.{name} is {value}: it must be above 0 and at most 1")


def _require_experts(where: str, experts: tuple[int, ...], count: int) -> None:
    if not experts:
        raise LeanMoeError(f"{where}.experts is empty: at least one expert must remain")
    if len(set(experts)) != len(experts):
        raise LeanMoeError(f"{where}.experts names an expert twice")
    if outside := [e for e in experts if not 0 <= e < count]:
        raise LeanMoeError(f"{where}.experts names {outside[0]}: it must be 0 to {count - 1}")
