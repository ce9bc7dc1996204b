"""What is compared with the full model: plans from files, or one rule for every layer in words."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from leanmoe.core.errors import LeanMoeError, unknown_name
from leanmoe.plan import Fingerprint, Plan, Rule

FULL = "full model"


@dataclass(frozen=True)
class Named:
    """A plan and what to call it."""

    name: str
    plan: Plan

    @property
    def digest(self) -> str:
        """Of its rules: results under equal rules are the same."""
        value = self.plan.to_json()
        text = json.dumps([value["bands"], value["prompt"]])
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def is_batch_aware(self, tokens: int) -> bool:
        """Whether what a token gets in a step of so many depends on the others in it."""
        return any(rule.is_batch_aware for rule in self.plan.rules_for(tokens))


def read_plans(
    files: Sequence[Path], rules: Sequence[str], model: Fingerprint
) -> tuple[Named, ...]:
    """The plans of `files`, then a plan for each of `rules`, checked against the model.

    A file is called by its own name, or by its folder's where that says nothing (plan.json).
    Raises LeanMoeError for a plan of another model and for two of one name.
    """
    found = [Named(_file_name(path), Plan.load(path)) for path in files]
    found += [Named(text, Plan.uniform(model, parse_rule(text))) for text in rules]
    names = [each.name for each in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise LeanMoeError(f"two plans are called {twice[0]!r}: give files of other names")
    for each in found:
        each.plan.check(model)
    return tuple(found)


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
    """ "top_k=6,keep_weights" as a rule. Raises LeanMoeError naming the part that is wrong."""
    known = [field.name for field in fields(Rule) if field.name != "experts"]
    value: dict[str, Any] = {}
    for part in text.split(","):
        name, _, given = part.strip().partition("=")
        if name not in known:
            raise unknown_name(f"rule {text!r}: the field", name, known)
        try:
            value[name] = json.loads(given) if given else True
        except json.JSONDecodeError as error:
            raise LeanMoeError(f"rule {text!r} sets {name} to {given!r}: give a number") from error
    return Rule.from_json(value, f"rule {text!r}")


def _file_name(path: Path) -> str:
    return path.resolve().parent.name if path.stem == "plan" else path.stem
