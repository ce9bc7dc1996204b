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
    file: Path | None = None
    """Where it was read from; it may hold other levels, too."""

    @property
    def digest(self) -> str:
        """The digest of its rules: results under equal rules are the same."""
        text = json.dumps(to_json([self.plan.bands, self.plan.prompt]))
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def is_batch_aware(self, tokens: int) -> bool:
        """Whether what a token gets in a step of so many depends on the others in it."""
        return any(rule.is_batch_aware for rule in self.plan.rules_for(tokens))


def read_plans(
    files: Sequence[Path],
    rules: Sequence[str],
    model: Fingerprint,
    by_folder: bool = True,
    levels: Sequence[str] = (),
) -> tuple[Named, ...]:
    """The plans of `files`, then a plan for each of `rules`, checked against the model.

    A file is called by its own name, or `by_folder` by its folder's where that says nothing
    (plan.json). Of a plan with several levels each of `levels` is a variant; where those are more
    than one, its name follows the file's. Raises LeanMoeError for a plan of another model, for two
    variants of one name, and for a plan with several levels where none was chosen.
    """
    plans = [each for path in files for each in _read(path, _file_name(path, by_folder), levels)]
    known = {level.name for each in plans for level in each.plan.levels}
    if unknown := [name for name in levels if name not in known]:
        raise unknown_name("--level", unknown[0], sorted(known))
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


def _read(path: Path, name: str, levels: Sequence[str]) -> list[Named]:
    plan = Plan.load(path)
    if len(plan.levels) < 2:
        return [Named(name, plan, path)]
    try:
        chosen = [plan.at(level) for level in levels or (None,)]
    except LeanMoeError as error:
        raise LeanMoeError(f"plan {name}: {error}") from error
    several = len(chosen) > 1
    return [Named(f"{name} {p.level.name}" if several else name, p, path) for p in chosen]


def _file_name(path: Path, by_folder: bool) -> str:
    return path.resolve().parent.name if by_folder and path.stem == "plan" else path.stem
