"""What is compared with the full model: plans from files, or one rule for every layer in words."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from leanmoe.core.errors import LeanMoeError, unknown_name
from leanmoe.core.schema import to_json
from leanmoe.plan import Fingerprint, Plan, Rule

FULL = "full model"


@dataclass(frozen=True)
class Named:
    """A plan and what to call it."""

    name: str
    plan: Plan

    @property
    def digest(self) -> str:
        """The digest of its rules: results under equal rules are the same."""
        text = json.dumps(to_json([self.plan.bands, self.plan.prompt]))
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def is_batch_aware(self, tokens: int) -> bool:
        """Whether what a token gets in a step of so many depends on the others in it."""
        return any(rule.is_batch_aware for rule in self.plan.rules_for(tokens))


def read_plans(
    files: Sequence[Path], rules: Sequence[str], model: Fingerprint, by_folder: bool = True
) -> tuple[Named, ...]:
    """The plans of `files`, then a plan for each of `rules`, checked against the model.

    A file is called by its own name, or `by_folder` by its folder's where that says nothing
    (plan.json). Raises LeanMoeError for a plan of another model and for two variants of one name.
    """
    plans = [Named(_file_name(path, by_folder), Plan.load(path)) for path in files]
    plans += [Named(text, Plan.uniform(model, parse_rule(text))) for text in rules]
    taken = {"full", FULL}
    for each in plans:
        if each.name in taken:
            raise LeanMoeError(
                f"another variant is called {each.name}: give a plan's file another name"
            )
        taken.add(each.name)
        try:
            each.plan.check(model)
        except LeanMoeError as error:
            raise LeanMoeError(f"plan {each.name}: {error}") from error
    return tuple(plans)


def require_at_work(plans: Sequence[Named], decode_batch: int) -> None:
    """Raises LeanMoeError for a plan that leaves steps of so many tokens as they are."""
    for each in plans:
        plan = each.plan
        if all(rule.is_empty for rule in (*plan.rules_for(decode_batch), *plan.prompt)):
            ends = [band.up_to for band in plan.bands]
            raise LeanMoeError(
                f"plan {each.name!r} runs the full model in steps of {decode_batch} tokens: give "
                f"--concurrency within its bands (they end at {ends})"
            )


def parse_rule(text: str) -> Rule:
    """ "top_k=6,renormalise=0" as a rule. Raises LeanMoeError naming the part that is wrong."""
    known = [field.name for field in fields(Rule) if field.name != "experts"]
    value: dict[str, Any] = {}
    for part in text.split(","):
        name, _, given = part.strip().partition("=")
        if name not in known:
            raise unknown_name(f"rule {text!r}: the field", name, known)
        try:
            value[name] = json.loads(given) if given else True
        except (ValueError, RecursionError) as error:
            raise LeanMoeError(f"rule {text!r} sets {name} to {given!r}: give a number") from error
    return Rule.from_json(value, f"rule {text!r}")


def _file_name(path: Path, by_folder: bool) -> str:
    return path.resolve().parent.name if by_folder and path.stem == "plan" else path.stem
