"""Which tasks of lm-evaluation-harness can be compared, found out before any is answered."""

from __future__ import annotations

import sys
from collections import defaultdict
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from io import StringIO
from typing import Any

from leanmoe.core.errors import LeanMoeError, first_line, unknown_name
from leanmoe.core.quiet import quiet_loggers
from leanmoe.eval.settings import EvalSettings
from leanmoe.stats.outcomes import forecast

ROLLING = "loglikelihood_rolling"
"""The harness's kind of task that is a perplexity, as wikitext."""
LOGGERS = ("lm_eval", "lm-eval", "datasets", "huggingface_hub")
PROBED = 3
"""Questions of a task that are answered with made-up replies, to see how it scores them."""


@dataclass(frozen=True)
class AskedTasks:
    """The tasks that will be answered."""

    settings: EvalSettings
    """The run's, with the tasks that can be compared alone."""
    metrics: dict[str, str]
    """By the harness's own task: the metric that says whether a question was right."""


def require_harness(settings: EvalSettings) -> None:
    """Raises LeanMoeError unless lm-evaluation-harness is there and knows the tasks."""
    names = settings.tasks
    if find_spec("lm_eval") is None:
        raise LeanMoeError(
            f"tasks {', '.join(names)} need lm-evaluation-harness: pip install 'leanmoe[eval]'; "
            "or --tasks none"
        )
    if settings.engine == "vllm":
        from leanmoe.eval.harness_vllm import require_engine

        require_engine()
    if settings.engine == "sglang":
        from leanmoe.eval.harness_sglang import require_server

        require_server()
    known = set(map(str, task_manager(settings).all_tasks))
    if unknown := [name for name in names if name not in known]:
        own = " to lm-evaluation-harness; own task files go in --include-path FOLDER"
        raise unknown_name("task", unknown[0], known, own)


def askable_tasks(settings: EvalSettings) -> AskedTasks:
    """Loads the tasks' data, says what so many questions can show, and leaves out what cannot run.

    Raises LeanMoeError where data cannot be fetched, and where nothing that was asked for can run.
    """
    names: list[str] = []
    metrics: dict[str, str] = {}
    count = 0
    for name in settings.tasks:
        able: dict[str, str] = {}
        tasks = _loaded(name, settings)
        for task, value in tasks.items():
            metric, why = _metric(value)
            if metric is None:
                _leave_out(f"task {task} {why}", settings, is_last=len(tasks) == 1)
                continue
            able[task] = metric
            asked = min(len(value.eval_docs), settings.limit or len(value.eval_docs))
            count += asked
            print(forecast(task, asked, settings.margin, settings.confidence), file=sys.stderr)
        names += [name] if len(able) == len(tasks) else able
        metrics |= able
    if len(names) > 1:
        said = forecast("all questions", count, settings.margin, settings.confidence)
        print(said, file=sys.stderr)
    return AskedTasks(replace(settings, tasks=tuple(names)), metrics)


def _loaded(name: str, settings: EvalSettings) -> dict[str, Any]:
    """The harness's tasks behind a name, which may be a group's, with their data."""
    try:
        with quiet_loggers(*LOGGERS):
            tasks: dict[str, Any] = task_manager(settings).load([name])["tasks"]
            for value in tasks.values():
                len(value.eval_docs)
    except Exception as error:  # datasets, the hub and task code each raise their own
        reason = (str(error).strip().splitlines() or [""])[0]
        reason = f"{type(error).__name__}: {reason}"
        raise LeanMoeError(
            f"the data set of task {name} could not be fetched ({reason}); without a network "
            "set HF_HOME to a filled cache, or describe files of yours in task files: "
            "--include-path FOLDER"
        ) from error
    return tasks


def _leave_out(line: str, settings: EvalSettings, is_last: bool) -> None:
    if is_last and len(settings.tasks) == 1 and not (settings.domain or settings.prompts):
        raise LeanMoeError(line)
    print(f"leanmoe: {line}; it is left out", file=sys.stderr)


def _metric(task: Any) -> tuple[str | None, str]:
    """The first metric by which a question is right or wrong; None with the reason otherwise.

    What a metric gives is seen on made-up replies: names do not tell ("acc" of TruthfulQA's mc2 is
    a share).
    """
    if task.OUTPUT_TYPE == ROLLING:
        return None, "is a perplexity of texts, no questions: give them as --domain NAME=FILE"
    try:
        with quiet_loggers(*LOGGERS), redirect_stderr(StringIO()):  # its bars of progress
            scored = _scores_of_made_up_replies(task)
    except Exception as error:  # task code raises what it likes
        return None, f"does not score a reply: {first_line(error)}"
    for metric, values in scored.items():
        if all(isinstance(v, int | float) and v in (0, 1) for v in values):
            return metric, ""
    return None, f"is judged by {', '.join(scored)}, which is not right or wrong on a question"


def _scores_of_made_up_replies(task: Any) -> dict[str, list[Any]]:
    """By metric: what the task gives its first questions, as the harness's evaluator asks it."""
    task.build_all_requests(limit=PROBED)
    by_question: dict[int, list[Any]] = defaultdict(list)
    for number, request in enumerate(task.instances):
        score = (-1.0 - 0.7 * (number % 5), False)
        target = task.doc_to_target(request.doc)
        text = f"{target[0] if isinstance(target, list) and target else target} and so on"
        request.resps = [text if request.request_type == "generate_until" else score]
        request.resps *= request.repeats
        by_question[request.doc_id].append(request)
    task.apply_filters()
    found: dict[str, list[Any]] = defaultdict(list)
    for requests in by_question.values():
        ordered = sorted(requests, key=lambda request: request.idx)
        first = next(iter(ordered[0].filtered_resps))
        replies = [request.filtered_resps[first] for request in ordered]
        for metric, value in task.process_results(ordered[0].doc, replies).items():
            found[metric].append(value.item() if hasattr(value, "item") else value)
    return found


def task_manager(settings: EvalSettings) -> Any:
    """The harness's index of tasks: of your own folder alone where that has all, which is quick."""
    made, own = import_module("lm_eval.tasks").TaskManager, settings.include_path
    if own is None:
        return _index_of_the_harness()
    try:
        with quiet_loggers(*LOGGERS):
            index = made(include_path=own, include_defaults=False)
            has_all = set(settings.tasks) <= set(index.all_subtasks)
            return index if has_all else made(include_path=own)
    except Exception as error:  # a name that is no text, a file that cannot be read, ...
        raise LeanMoeError(f"task files in {own} cannot be read: {first_line(error)}") from error


@cache
def _index_of_the_harness() -> Any:
    with quiet_loggers(*LOGGERS):
        return import_module("lm_eval.tasks").TaskManager()
