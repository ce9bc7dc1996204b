"""Tasks of lm-evaluation-harness, answered by the full model and by plans.

Letters: N questions.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from leanmoe.errors import LeanMoeError, did_you_mean
from leanmoe.job.answers import Answers
from leanmoe.job.eval_settings import EvalSettings
from leanmoe.job.folder import RunFolder
from leanmoe.job.variants import FULL, Named
from leanmoe.plan import Band, Plan
from leanmoe.quality.outcomes import forecast
from leanmoe.storage import write_json

PLAN_VARIABLE = "LEANMOE_PLAN"
"""Where the vLLM plugin reads its plan's path from."""


def require_harness(names: Sequence[str], settings: EvalSettings) -> None:
    """Raises LeanMoeError unless lm-evaluation-harness is there and knows the tasks."""
    if find_spec("lm_eval") is None:
        raise LeanMoeError(
            f"tasks {', '.join(names)} need lm-evaluation-harness: pip install 'leanmoe[eval]'; "
            "for local files of blimp, lambada, piqa and qasc give --data FOLDER"
        )
    if settings.engine == "vllm" and find_spec("vllm") is None:
        raise LeanMoeError("--engine vllm needs vLLM: pip install 'leanmoe[vllm]'")
    known = set(_manager(settings).all_tasks)
    if unknown := [name for name in names if name not in known]:
        raise LeanMoeError(
            f"task {unknown[0]!r} is not known to lm-evaluation-harness: "
            f"{did_you_mean(unknown[0], known)}own task files go in --tasks-dir FOLDER"
        )


def answer_harness(
    model: Any,
    tokenizer: Any,
    names: Sequence[str],
    plans: Sequence[Named],
    settings: EvalSettings,
    folder: RunFolder,
) -> dict[str, dict[str, list[Answers]]]:
    """By plan (the full model first) and task: the answers of each mix."""
    _announce(names, settings)
    full = Named(FULL, Plan(plans[0].plan.model))
    found: dict[str, dict[str, list[Answers]]] = {}
    for each in (full, *plans):
        company = each.depends_on_company(settings.decode_batch)
        mixes = settings.mixes if company and settings.engine == "transformers" else 1
        found[each.name] = {}
        for mix in range(mixes):
            key = "full" if each is full else each.digest
            if settings.engine == "vllm":
                run = _in_vllm(each, names, settings, folder)
            else:
                run = _in_process(model, tokenizer, each, names, settings, mix)
            stored = folder.step(f"harness-{settings.engine}-{key}-{mix}", run)
            for task, right in stored.items():
                answers = Answers(np.array(right, dtype=bool), None, None)
                found[each.name].setdefault(task, []).append(answers)
    return found


def _manager(settings: EvalSettings) -> Any:
    with _quiet():
        return import_module("lm_eval.tasks").TaskManager(include_path=settings.tasks_dir)


def _announce(names: Sequence[str], settings: EvalSettings) -> None:
    """Loads the tasks' data and says what so many questions can show."""
    manager = _manager(settings)
    count = 0
    for name in names:
        try:
            with _quiet():
                tasks = manager.load([name])["tasks"]
                sizes = {task: len(value.eval_docs) for task, value in tasks.items()}
        except Exception as error:  # datasets, the hub and task code each raise their own
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise LeanMoeError(
                f"the data set of task {name} could not be fetched ({reason}); without a network "
                "give local files: --data FOLDER, or --tasks-dir FOLDER with task files of your own"
            ) from error
        for task, size in sizes.items():
            asked = min(size, settings.limit or size)
            count += asked
            line = forecast(task, asked, settings.margin, settings.confidence)
            print(line, file=sys.stderr)
    if len(names) > 1:
        print(
            forecast("all questions", count, settings.margin, settings.confidence), file=sys.stderr
        )


def _in_process(
    model: Any,
    tokenizer: Any,
    each: Named,
    names: Sequence[str],
    settings: EvalSettings,
    mix: int,
) -> Callable[[], dict[str, list[int]]]:
    def compute() -> dict[str, list[int]]:
        from leanmoe.job.harness_model import planned_model

        return _answers(planned_model(model, tokenizer, each, settings, mix), names, settings)

    return compute


def _in_vllm(
    each: Named, names: Sequence[str], settings: EvalSettings, folder: RunFolder
) -> Callable[[], dict[str, list[int]]]:
    """In a process of its own: an engine gives its memory back only when its process ends."""

    def compute() -> dict[str, list[int]]:
        path = folder.path / "plans" / f"{each.digest}.json"
        write_json(path, every_step(each.plan, settings.decode_batch).to_json())
        with get_context("spawn").Pool(1) as pool:
            return pool.apply(_vllm_answers, (path, tuple(names), settings))

    return compute


def every_step(plan: Plan, decode_batch: int) -> Plan:
    """The plan with the rules of so many tokens at work in steps of any size.

    vLLM scores answers as prompts, in steps of thousands of tokens; with the plan's own bands it
    would score the full model.
    """
    if plan.is_empty:
        return plan
    return Plan(plan.model, (Band(None, plan.rules_for(decode_batch)),), (), plan.provenance)


def _vllm_answers(plan: Path, names: Sequence[str], settings: EvalSettings) -> dict[str, list[int]]:
    os.environ[PLAN_VARIABLE] = str(plan)
    made = import_module("lm_eval.models.vllm_causallms").VLLM(
        pretrained=settings.model,
        dtype=settings.dtype or "auto",
        trust_remote_code=settings.trust_remote_code,
        seed=settings.seed,
        max_num_seqs=settings.decode_batch,
    )
    return _answers(made, names, settings)


def _answers(made: Any, names: Sequence[str], settings: EvalSettings) -> dict[str, list[int]]:
    """1 or 0 by task and question, in the questions' order."""
    with _quiet():
        done = import_module("lm_eval").simple_evaluate(
            model=made,
            tasks=list(names),
            task_manager=_manager(settings),
            num_fewshot=settings.fewshot,
            limit=settings.limit,
            bootstrap_iters=0,
            log_samples=True,
            random_seed=settings.seed,
            numpy_random_seed=settings.seed,
            torch_random_seed=settings.seed,
            fewshot_random_seed=settings.seed,
        )
    return {task: right_or_wrong(task, samples) for task, samples in done["samples"].items()}


def right_or_wrong(task: str, samples: Sequence[dict[str, Any]]) -> list[int]:
    """Each question's first metric, by the first filter. Raises LeanMoeError unless 0 or 1."""
    first = samples[0].get("filter")
    mine = sorted(
        (sample for sample in samples if sample.get("filter") == first),
        key=lambda sample: int(sample["doc_id"]),
    )
    metric = mine[0]["metrics"][0]
    values = [float(sample[metric]) for sample in mine]
    if bad := [value for value in values if value not in (0.0, 1.0)]:
        raise LeanMoeError(
            f"task {task} is judged by {metric}, which is {bad[0]:g} on a question: only tasks "
            "that are right or wrong can be compared here"
        )
    return [int(value) for value in values]


@contextmanager
def _quiet() -> Iterator[None]:
    """The harness's own log and its many progress bars stay off the screen."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "lm-eval", "datasets")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
