"""A finished plan on text that it was not made for, put to the test that accepted it.

A claim holds for each kind of text by itself. Many kinds are many chances of a wrong one, so the
verdicts of all loads and kinds share the error: `holm`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from leanmoe.core.errors import LeanMoeError
from leanmoe.core.intervals import Margin
from leanmoe.core.run_folder import RunFolder
from leanmoe.core.schema import from_json, to_json
from leanmoe.core.text import read_kinds
from leanmoe.eval.settings import EvalSettings
from leanmoe.models.shape import Fingerprint
from leanmoe.plan.named_plans import Named, read_plans
from leanmoe.results.eval import Transfer, TransferRow
from leanmoe.results.tune import TuneResults
from leanmoe.runtime import IMPLEMENTATION, apply, partial_attention_reason
from leanmoe.scoring.divergence import Reference, divergence, reference
from leanmoe.scoring.windows import Windows
from leanmoe.stats.losses import Divergence
from leanmoe.stats.paired import holm
from leanmoe.tune.context import BATCH_TOKENS, full_windows, require_enough
from leanmoe.tune.prove import kind_loss
from leanmoe.tune.settings import TuneSettings

OLD_NAMES = {"loads": "concurrency", "input_tokens": "input_len", "output_tokens": "output_len"}
"""What files of 0.1.0 call settings of today."""
GONE = ("strategy",)
"""Settings of 0.1.0 that only the search was by."""


@dataclass(frozen=True)
class FinishedRun:
    """A run of `tune`: its plan, and how that was proven."""

    plan: Named
    settings: TuneSettings
    margin: Margin


def read_run(folder: Path, model: Fingerprint, levels: Sequence[str] = ()) -> FinishedRun:
    """Reads the run in `folder`, and of its plan the one of `levels`.

    Raises LeanMoeError where there is none, for an empty plan, for a plan of another model, and
    where several levels are asked for.
    """
    if len(levels) > 1:
        raise LeanMoeError(f"--transfer tests one level: {', '.join(levels)} were given")
    results = TuneResults.load(folder / "results.json")
    stored = {
        OLD_NAMES.get(name, name): value
        for name, value in results.settings.items()
        if name not in (*GONE, "margin")
    }
    stored |= {"margins": to_json(tuple(results.margins.values())), "text": stored["text"] or []}
    settings = from_json(TuneSettings, stored, f"settings of {folder}")
    (plan,) = read_plans([folder / "plan.json"], [], model, levels=levels)
    if plan.plan.is_empty:
        raise LeanMoeError(f"the plan of {folder} is empty: there is nothing to prove")
    proof = plan.plan.level.proof
    return FinishedRun(plan, settings, proof.margin if proof else settings.margins[0])


def transfer_windows(
    run: FinishedRun, model: Any, tokenizer: Any, settings: EvalSettings
) -> dict[str, Windows]:
    """The windows of each domain, cut as the run cut its own text.

    Raises LeanMoeError for a domain that is too little to prove anything on.
    """
    whole, prompt, reply = run.settings.scored_window(
        partial_attention_reason(model.config) is None
    )
    windows = {}
    for name, corpus in read_kinds(dict(settings.domain)).items():
        try:
            documents, tokens = corpus.documents, settings.domain_tokens
            cut = full_windows(documents, tokenizer, whole, tokens, run.settings)
            require_enough(cut, run.settings, "--domain-tokens")
        except LeanMoeError as error:
            raise LeanMoeError(f"domain {name}: {error}") from error
        windows[name] = cut.after_prompt(prompt, reply)
    return windows


def transfer(
    model: Any, run: FinishedRun, windows: Mapping[str, Windows], folder: RunFolder
) -> Transfer:
    """The plan's loss on every domain at each load of its run, with the run's margin.

    The verdicts share the error.
    """
    references: dict[str, Reference] = {}

    def drawn(name: str, load: int) -> list[Any]:
        if name not in references:
            references[name] = reference(model, windows[name], BATCH_TOKENS)
        draws = range(run.settings.batch_draws if load > 1 and run.plan.is_batch_aware(load) else 1)
        return [to_json(_once(model, run, references[name], load, draw)) for draw in draws]

    loads = run.settings.concurrency
    verdicts = []
    for load in loads:
        for name in windows:
            stored = folder.step(
                f"transfer-{name}-{load}-{run.plan.digest}", partial(drawn, name, load)
            )
            draws = [Divergence.from_json(each) for each in stored]
            verdicts.append(partial(kind_loss, run.settings, run.margin, name, draws))
    found = iter(holm(verdicts))
    rows = tuple(TransferRow(load, tuple(next(found) for _ in windows)) for load in loads)
    return Transfer(run.plan.plan, run.margin, run.settings.confidence, rows)


def _once(model: Any, run: FinishedRun, against: Reference, load: int, draw: int) -> Divergence:
    prompt = against.windows.prompt_in_call
    with apply(
        model,
        run.plan.plan,
        experts=IMPLEMENTATION,
        decode_batch=load,
        prompt_tokens=prompt,
    ):
        what = f"Transfer, concurrency {load}"
        return divergence(model, against, what, load, BATCH_TOKENS, draw)
