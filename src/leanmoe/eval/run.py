"""`leanmoe eval`: the same questions, texts and prompts under the full model and under plans."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from leanmoe.core.errors import LeanMoeError
from leanmoe.core.provenance import collect
from leanmoe.core.quiet import quiet_transformers
from leanmoe.core.run_folder import RunFolder
from leanmoe.core.schema import to_json
from leanmoe.eval.answers import Answers, answer_tasks, loss_changes
from leanmoe.eval.domains import domain_matrix, read_domains
from leanmoe.eval.generate import generation
from leanmoe.eval.local_tasks import LOCAL, Encoder, Task, read_task
from leanmoe.eval.settings import EvalSettings
from leanmoe.models.shape import read_shape
from leanmoe.plan import Plan
from leanmoe.plan.named_plans import FULL, read_plans, require_at_work
from leanmoe.results.eval import AccuracyChange, EvalResults
from leanmoe.runtime import apply, load_model, served_experts, shape_of
from leanmoe.stats.outcomes import (
    difference,
    forecast,
    mean_of_tasks,
    non_inferior_accuracy,
)

RESULTS = "results.json"
POOLED, MEAN = "all questions", "mean of tasks"


def evaluate(
    settings: EvalSettings,
    plan_files: Sequence[Path],
    rules: Sequence[str],
    output: Path,
    command: str,
    overwrite: bool = False,
) -> EvalResults:
    """Runs everything asked for into folder `output`, taking up what an earlier run left.

    Raises LeanMoeError before any expensive work where it can.
    """
    settings.check()
    plans = read_plans(plan_files, rules, read_shape(settings.model).fingerprint())
    require_at_work(plans, settings.concurrency)
    if not plans and settings.calibrate is None:
        raise LeanMoeError("nothing to compare with the full model: give --plan or --rule")
    local, harness = _sorted_out(settings)
    folder = RunFolder.open(output, settings, overwrite, "eval")
    quiet_transformers()
    model, tokenizer = _load(settings)
    tasks = _read_local(local, model, tokenizer, settings)
    texts = read_domains(tokenizer, settings)
    answers: dict[str, dict[str, list[Answers]]] = {}
    if plans and tasks:
        answers = answer_tasks(model, tasks, plans, settings, folder)
    if plans and harness:
        from leanmoe.eval.harness import answer_harness

        more = answer_harness(model, tokenizer, harness, plans, settings, folder)
        answers = {name: answers.get(name, {}) | by_task for name, by_task in more.items()}
    results: dict[str, Any] = {
        EvalResults.KIND: EvalResults.VERSION,
        "provenance": collect(command, settings.seed).to_json(),
        "label": "measured",
        "settings": settings.to_json(),
        "experts_implementation": _implementation(model, settings),
        "plans": [{"name": p.name, "plan": p.plan.to_json()} for p in plans],
    }
    if answers:
        results["tasks"] = compared(answers, settings, {each.name: each.metric for each in tasks})
    if plans and settings.prompts is not None:
        results["generation"] = generation(model, tokenizer, plans, settings, folder)
    if settings.domain:
        results["domains"] = domain_matrix(model, tokenizer, texts, plans, settings, folder)
    results |= {"made_with": folder.made_with(), "seconds": folder.seconds()}
    evaluated = EvalResults.from_json(to_json(results))
    evaluated.write(folder.path / RESULTS)
    return evaluated


def compared(
    answers: Mapping[str, Mapping[str, Sequence[Answers]]],
    settings: EvalSettings,
    metrics: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """Each plan on each task, on all questions pooled, and on the mean of tasks, with verdicts."""
    full = answers[FULL]
    rows: list[dict[str, Any]] = []
    for name, by_task in answers.items():
        if name == FULL:
            continue
        differences: list[AccuracyChange] = []
        for task, batch_draws in by_task.items():
            draws_ZU = np.stack([each.right_U for each in batch_draws])
            each = difference(full[task][0].right_U, draws_ZU, settings.confidence)
            differences.append(each)
            loss = loss_changes(full[task][0], batch_draws, settings)
            metric = (metrics or {}).get(task, "")
            rows.append(_row(name, task, each, settings, loss=loss, metric=metric))
        if len(differences) > 1:
            rows.append(_row(name, POOLED, _pooled(full, by_task, settings), settings))
            rows.append(_row(name, MEAN, mean_of_tasks(differences), settings))
    return rows


def _pooled(
    full: Mapping[str, Sequence[Answers]],
    by_task: Mapping[str, Sequence[Answers]],
    settings: EvalSettings,
) -> AccuracyChange:
    """The difference over the questions of all tasks, in as many draws as every task has."""
    right_U = np.concatenate([full[task][0].right_U for task in by_task])
    draws = range(min(map(len, by_task.values())))
    draws_ZU = np.stack(
        [np.concatenate([each[draw].right_U for each in by_task.values()]) for draw in draws]
    )
    return difference(right_U, draws_ZU, settings.confidence)


def _row(
    plan: str, task: str, change: AccuracyChange, settings: EvalSettings, **more: Any
) -> dict[str, Any]:
    verdict = non_inferior_accuracy(change, settings.margin, settings.confidence)
    values = to_json(change)
    values["accuracy"] = values.pop("plan")
    return {"plan": plan, "task": task, **values, "verdict": asdict(verdict), **more}


def _sorted_out(settings: EvalSettings) -> tuple[list[str], list[str]]:
    """The tasks read from files in `data`, and those of lm-evaluation-harness.

    Raises LeanMoeError for a task that neither has.
    """
    local = [name for name in settings.tasks if settings.data is not None and name in LOCAL]
    harness = [name for name in settings.tasks if name not in local]
    if harness:
        from leanmoe.eval.harness import require_harness

        require_harness(harness, settings)
    return local, harness


def _read_local(
    names: Sequence[str], model: Any, tokenizer: Any, settings: EvalSettings
) -> list[Task]:
    if not names:
        return []
    encoder = Encoder(model, tokenizer)
    folder = Path(str(settings.data))
    tasks = [read_task(name, encoder, folder, settings.limit) for name in names]
    for task in tasks:
        line = forecast(task.name, len(task.items), settings.margin, settings.confidence)
        print(line, file=sys.stderr)
    if len(tasks) > 1:
        count = sum(len(task.items) for task in tasks)
        print(forecast(POOLED, count, settings.margin, settings.confidence), file=sys.stderr)
    return tasks


def _load(settings: EvalSettings) -> tuple[Any, Any]:
    """The model and its tokenizer; nothing where vLLM loads them in a process of its own."""
    if settings.engine == "vllm":
        return None, None
    return load_model(settings.model, settings.dtype, settings.trust_remote_code)


def _implementation(model: Any, settings: EvalSettings) -> str:
    """What computes the experts."""
    if settings.engine == "vllm":
        from leanmoe.core.installed_vllm import require_vllm

        return f"vllm {require_vllm(with_plans=True).version}"
    plan = Plan(shape_of(model).fingerprint())
    with apply(model, plan, experts=served_experts(model)) as applied:
        return applied.implementation
