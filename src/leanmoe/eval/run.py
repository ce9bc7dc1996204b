"""`leanmoe eval`: the same questions, texts and prompts under the full model and under plans."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from leanmoe.core.errors import LeanMoeError
from leanmoe.core.intervals import LossChange
from leanmoe.core.provenance import collect
from leanmoe.core.quiet import quiet_transformers
from leanmoe.core.run_folder import RunFolder
from leanmoe.core.schema import all_fields
from leanmoe.eval.domains import domain_matrix, read_domains
from leanmoe.eval.generate import generation
from leanmoe.eval.harness import Answers, answer_harness, loss_changes
from leanmoe.eval.harness_tasks import askable_tasks, require_harness
from leanmoe.eval.prompts import prompts_of
from leanmoe.eval.settings import EvalSettings
from leanmoe.eval.transfer import read_run, transfer, transfer_windows
from leanmoe.models.shape import read_shape
from leanmoe.plan import Plan
from leanmoe.plan.named_plans import FULL, read_plans, require_at_work
from leanmoe.results.eval import AccuracyChange, EvalResults, EvaluatedPlan, TaskRow
from leanmoe.runtime import apply, load_model, served_experts, shape_of
from leanmoe.stats.outcomes import (
    difference,
    mean_of_tasks,
    non_inferior_accuracy,
)
from leanmoe.stats.paired import holm

RESULTS = "results.json"
POOLED, MEAN = "all questions", "mean of tasks"
Change = Callable[[float], AccuracyChange]
"""A change in accuracy, given the confidence of its interval and bound."""


def evaluate(
    settings: EvalSettings,
    plan_files: Sequence[Path],
    levels: Sequence[str],
    rules: Sequence[str],
    output: Path,
    command: str,
    overwrite: bool = False,
) -> EvalResults:
    """Runs everything asked for into folder `output`, taking up what an earlier run left.

    Compared are the `levels` of the plans in `plan_files`, and `rules` in words.
    Raises LeanMoeError before any expensive work where it can.
    """
    settings.check()
    model_asked = read_shape(settings.model).fingerprint()
    plans = read_plans(plan_files, rules, model_asked, levels=levels if plan_files else ())
    require_at_work(plans, settings.concurrency)
    if levels and not plan_files and settings.transfer is None:
        raise LeanMoeError(f"--level {levels[0]} is one of a plan's: give one with --plan")
    if not plans and settings.calibrate is None and settings.transfer is None:
        raise LeanMoeError("nothing to compare with the full model: give --plan or --rule")
    finished = None
    if settings.transfer is not None:
        finished = read_run(Path(settings.transfer), model_asked, levels)
    if settings.tasks:
        require_harness(settings)
    quiet_transformers()
    asked = askable_tasks(settings) if plans and settings.tasks else None
    folder = RunFolder.open(output, settings, overwrite, "eval")
    model, tokenizer = _load(settings)
    is_matrix = bool(plans or settings.calibrate)
    texts = read_domains(tokenizer, settings) if is_matrix else []
    moved = None
    if finished is not None:
        windows = transfer_windows(finished, model, tokenizer, settings)
        moved = transfer(model, finished, windows, folder)
    prompts = prompts_of(model, tokenizer, settings) if settings.prompts is not None else ()
    tasks: tuple[TaskRow, ...] = ()
    if asked is not None and asked.metrics:
        tasks = compared(answer_harness(model, tokenizer, plans, asked, folder), settings)
    replies = domains = None
    if plans and prompts:
        replies = generation(model, tokenizer, prompts, plans, settings, folder)
    if texts:
        domains = domain_matrix(model, tokenizer, texts, plans, settings, folder)
    results = EvalResults(
        provenance=collect(command, settings.seed),
        label="measured",
        settings=all_fields(settings),
        experts_implementation=_implementation(model, settings),
        plans=tuple(EvaluatedPlan(each.name, each.plan) for each in plans),
        tasks=tasks,
        generation=replies,
        domains=domains,
        transfer=moved,
        made_with=folder.made_with(),
        seconds=folder.seconds(),
    )
    results.save(folder.path / RESULTS)
    return results


def compared(
    answers: Mapping[str, Mapping[str, Sequence[Answers]]], settings: EvalSettings
) -> tuple[TaskRow, ...]:
    """Each plan on each task, on all questions pooled, and on the mean of tasks, with verdicts.

    All verdicts of the run share the error.
    """
    full = answers[FULL]
    changes: dict[tuple[str, str], Change] = {}
    losses: dict[tuple[str, str], LossChange | None] = {}
    for name, by_task in answers.items():
        if name == FULL:
            continue
        alone: list[Change] = []
        for task, batch_draws in by_task.items():
            draws_ZU = np.stack([each.right_U for each in batch_draws])
            alone.append(partial(difference, full[task][0].right_U, draws_ZU))
            changes[name, task] = alone[-1]
            losses[name, task] = loss_changes(full[task][0], batch_draws, settings)
        if len(alone) > 1:
            changes[name, POOLED] = _pooled(full, by_task)
            changes[name, MEAN] = partial(_mean, alone)
    verdicts = holm(
        [
            partial(non_inferior_accuracy, change, settings.margin, settings.confidence)
            for change in changes.values()
        ]
    )
    rows = []
    for (name, task), verdict in zip(changes, verdicts, strict=True):
        change = changes[name, task](settings.confidence)
        values = {**vars(change), "plan": name, "accuracy": change.plan}
        loss = losses.get((name, task))
        rows.append(TaskRow(**values, task=task, verdict=verdict, loss=loss))
    return tuple(rows)


def _mean(alone: Sequence[Change], confidence: float) -> AccuracyChange:
    return mean_of_tasks([change(confidence) for change in alone])


def _pooled(
    full: Mapping[str, Sequence[Answers]],
    by_task: Mapping[str, Sequence[Answers]],
) -> Change:
    """The difference over the questions of all tasks, in as many draws as every task has."""
    right_U = np.concatenate([full[task][0].right_U for task in by_task])
    draws = range(min(map(len, by_task.values())))
    draws_ZU = np.stack(
        [np.concatenate([each[draw].right_U for each in by_task.values()]) for draw in draws]
    )
    return partial(difference, right_U, draws_ZU)


def _load(settings: EvalSettings) -> tuple[Any, Any]:
    """The model and its tokenizer; nothing where an engine loads them in a process of its own."""
    if settings.engine != "transformers":
        return None, None
    return load_model(settings.model, settings.dtype, settings.trust_remote_code)


def _implementation(model: Any, settings: EvalSettings) -> str:
    """What computes the experts."""
    if settings.engine == "vllm":
        from leanmoe.core.installed_vllm import require_vllm

        return f"vllm {require_vllm(with_plans=True).version}"
    if settings.engine == "sglang":
        from leanmoe.core.installed_sglang import require_sglang

        return f"sglang {require_sglang(with_plans=True)}"
    plan = Plan(shape_of(model).fingerprint())
    with apply(model, plan, experts=served_experts(model)) as applied:
        return applied.implementation
