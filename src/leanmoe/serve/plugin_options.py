"""Which parts of a plan an engine can run, and what its plugin is asked to do; needs no torch.

A part that an engine cannot run is refused, unless the user drops it by name. An engine starts its
worker processes itself, so its user can reach them by variables alone. Their names, values and
meanings are in `core.environment.VARIABLES`; they are read and checked once.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from leanmoe.core.environment import (
    BATCH_SCOPE,
    CHECK_ROWS,
    DROP,
    EXPERTS,
    LEVEL,
    PLAN,
    SLO,
    STATISTICS,
    TIERS,
    VARIABLES,
    Variable,
)
from leanmoe.core.errors import LeanMoeError
from leanmoe.plan import Plan, Rule

__all__ = ["VARIABLES", "PluginOptions", "Variable"]

PROMPT = "prompt"
DROPPABLE = (PROMPT,)
"""Parts of a plan that a user can consent to leave out."""
PROMPT_REASON = (
    "rules for prompt tokens cannot run: a captured step does not know which of its "
    "tokens are a prompt's"
)
RANK, ALL = "rank", "all"
"""Batch scopes: whose tokens a batch-aware rule sees under data parallelism."""
TELL_PROMPTS = ("vLLM",)
"""Engines whose adapter tells a prompt's rows from others in every step, captured ones too."""
KNOW_RANKS = ("vLLM",)
"""Engines whose adapter knows on which rank each expert is, and can ask the other ranks."""


def without(plan: Plan, parts: Sequence[str]) -> Plan:
    """The plan without the parts named; raises LeanMoeError for a name not in `DROPPABLE`."""
    for part in parts:
        if part not in DROPPABLE:
            raise LeanMoeError(f"cannot drop {part!r}: it must be {' or '.join(DROPPABLE)}")
    if PROMPT not in parts or not any(level.prompt for level in plan.levels):
        return plan
    # What was proven was proven with them.
    levels = tuple(replace(level, prompt=(), proof=None) for level in plan.levels)
    return replace(plan, levels=levels)


def is_plain(rule: Rule) -> bool:
    """Whether an engine's own routing does what the rule says, once it is given the rule's top-k.

    With fewer experts and `renormalise` below 1 it does not: it normalises the weights anew.
    """
    return rule.is_empty or rule == Rule(top_k=rule.top_k)


def has_prompt_rules(plan: Plan) -> bool:
    """Whether prompt rows do not fall under the bands, as replies do."""
    return not plan.is_empty and any(level.prompt for level in plan.levels)


def check_parts(plan: Plan, engine: str, consent: str) -> None:
    """Raises LeanMoeError if `engine`, vLLM or SGLang, cannot run a part of the plan.

    `consent` is what the user can write to leave that part out.
    """
    if has_prompt_rules(plan) and engine not in TELL_PROMPTS:
        raise LeanMoeError(f"{engine}: {PROMPT_REASON}; {consent} runs the bands without them")
    if engine not in KNOW_RANKS:
        check_placed(plan, engine)


def check_placed(plan: Plan, engine: str) -> None:
    """Raises LeanMoeError if a rule needs to know on which GPU each expert is."""
    if plan.has_budget_per_rank:
        raise LeanMoeError(
            f"{engine}: budget_per_rank cannot run: the adapter does not know on which GPU "
            "an expert is; on one GPU, budget is the same"
        )


def check_batch_scope(value: str, engine: str) -> None:
    """Raises LeanMoeError unless `engine` can run batch-aware rules over the scope `value`."""
    if value not in (RANK, ALL):
        raise LeanMoeError(f"{BATCH_SCOPE} is {value!r}: it must be {RANK} or {ALL}")
    if value == ALL and engine not in KNOW_RANKS:
        raise LeanMoeError(
            f"{BATCH_SCOPE} is {ALL!r}: {engine} cannot share experts among data-parallel ranks "
            f"under leanmoe; unset it, or set {RANK}"
        )


def notes(plan: Plan, engine: str) -> tuple[str, ...]:
    """What the user of an engine should know of how it runs the plan, one sentence each."""
    rules = [rule for band in plan.bands for rule in band.rules]
    skips = any(
        rule.threshold or rule.top_p or rule.is_batch_aware or rule.experts for rule in rules
    )
    is_vllm = engine in KNOW_RANKS
    sentences = []
    if skips:
        spared = "0.26 and newer spare" if is_vllm else "its Triton experts spare"
        spared += " its row where the log says id -1, else "
        sentences.append(
            f"{engine} computes a skipped slot as a row of the token's best expert with weight 0, "
            f"which reads no further weights: {spared}its products are not saved"
        )
    ends = [band.up_to for band in plan.bands if band.up_to is not None]
    counts = not is_vllm or has_prompt_rules(plan)  # those count the real rows
    if ends and not counts:
        sentences.append(
            f"a band is picked by the rows that a step computes, padding of captured graphs "
            f"included: make {', '.join(map(str, ends))} capture sizes"
        )
    if plan.bands and plan.bands[-1].up_to is not None:
        sentences.append(f"steps of more than {plan.bands[-1].up_to} rows run the full model")
    if any(rule.is_batch_aware for rule in rules):
        more = f"; {BATCH_SCOPE}={ALL} makes it see all ranks'" if is_vllm else ""
        sentences.append(f"a batch-aware rule sees the tokens of its own data-parallel rank{more}")
    return tuple(sentences)


VLLM, LEANMOE = "vllm", "leanmoe"
"""Whose kernels compute the experts."""


@dataclass(frozen=True)
class PluginOptions:
    """What one process of an engine does with a plan."""

    path: str = ""
    """The plan's file, for the log and the metrics; of several plans all, with commas between."""
    drop: tuple[str, ...] = ()
    """Parts of the plan that may be left out: `DROPPABLE`."""
    collect_stats: bool = False
    """Keeps each step's expert ids, so that one can ask what ran."""
    check_rows: bool = False
    """Compares in each step which rows are a prompt's with the positions on the device."""
    cross_rank: bool = False
    """A batch-aware rule sees the tokens of all data-parallel ranks, not its own rank's alone."""
    experts: str | None = None
    """Whose kernels compute the experts, VLLM or LEANMOE; None: leanmoe's in layers that skip slots
    and whose own kernels cannot, where leanmoe's can compute them."""
    level: str | None = None
    """The level to run, of a plan that has several; with tiers that of requests that name none."""
    tiers: bool = False
    """Requests may name the level that they are served at."""
    slo: str | None = None
    """The limits that load control holds, as text; None: load changes no level."""

    @classmethod
    def from_environ(
        cls, engine: str, environ: Mapping[str, str] = os.environ
    ) -> PluginOptions | None:
        """What `engine`, vLLM or SGLang, is asked to do; None where it is given no plan.

        Raises LeanMoeError for a value that is not allowed, or that this engine cannot do.
        """
        path = environ.get(PLAN)
        if not path:
            return None
        scope = environ.get(BATCH_SCOPE) or RANK
        check_batch_scope(scope, engine)
        experts = _one_of(environ, EXPERTS, (VLLM, LEANMOE)) if environ.get(EXPERTS) else None
        if experts == LEANMOE and engine != "vLLM":
            raise LeanMoeError(
                f"{EXPERTS} is {experts!r}: leanmoe's kernels cannot run in {engine}; unset it"
            )
        options = cls(
            path,
            tuple(part.strip() for part in environ.get(DROP, "").split(",") if part.strip()),
            collect_stats=_one_of(environ, STATISTICS, ("0", "1")) == "1",
            check_rows=_one_of(environ, CHECK_ROWS, ("0", "1")) == "1",
            cross_rank=scope == ALL,
            experts=experts,
            level=environ.get(LEVEL) or None,
            tiers=_one_of(environ, TIERS, ("0", "1")) == "1",
            slo=environ.get(SLO) or None,
        )
        if options.has_tiers and engine != "vLLM":
            raise LeanMoeError(
                f"{engine} serves one level of one plan: unset {TIERS} and {SLO}, name one "
                f"in {PLAN}"
            )
        return options

    @property
    def has_tiers(self) -> bool:
        """Whether the rows of one step may be under several levels."""
        return self.tiers or self.slo is not None or len(plan_paths(self.path)) > 1

    def load_plan(self, engine: str) -> Plan:
        """The plan of one level, less what may be left out.

        Raises LeanMoeError if `engine` cannot run it.
        """
        plan = without(Plan.load(Path(self.path)).at(self.level), self.drop)
        check_parts(plan, engine, f"{DROP}={PROMPT}")
        return plan


def plan_paths(text: str) -> list[Path]:
    """The files that are named, with commas between; raises LeanMoeError for one named twice."""
    paths = [Path(each.strip()) for each in text.split(",")]
    if twice := [path for path in paths if paths.count(path) > 1]:
        raise LeanMoeError(f"the plan {twice[0]} is given twice")
    return paths


def plan_names(text: str) -> tuple[str, ...]:
    """What a change of plan calls each of the files: its name without the folder and `.json`."""
    names = tuple(path.stem for path in plan_paths(text))
    if twice := [name for name in names if names.count(name) > 1]:
        raise LeanMoeError(f"two plans are called {twice[0]}: give their files other names")
    return names


def _one_of(environ: Mapping[str, str], name: str, allowed: tuple[str, str]) -> str:
    value = environ.get(name) or allowed[0]
    if value not in allowed:
        raise LeanMoeError(f"{name} is {value!r}: it must be {' or '.join(allowed)}")
    return value
