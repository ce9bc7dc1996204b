"""Calibrated on one kind of text, tested on another: the loss of each plan on each domain."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leanmoe.core.errors import LeanMoeError
from leanmoe.core.run_folder import RunFolder
from leanmoe.core.text import SECTION_CHARACTERS, Document, read_corpus, sections
from leanmoe.eval.settings import EvalSettings
from leanmoe.plan import Plan
from leanmoe.plan.named_plans import Named
from leanmoe.prune.criteria import (
    CRITERIA,
    as_plan,
    best_experts,
    kept_count,
    observe,
    rank_experts,
)
from leanmoe.results.eval import DomainMatrix, DomainRow, EvaluatedDomain
from leanmoe.runtime import apply, served_experts, shape_of
from leanmoe.scoring.divergence import losses
from leanmoe.scoring.windows import WINDOW_TOKENS, Windows, cut
from leanmoe.stats.losses import Losses
from leanmoe.stats.paired import loss_increase, require_documents

FEWEST_DOCUMENTS = 60
"""A text of fewer is cut into passages, which are then what statistics are paired by."""


@dataclass(frozen=True)
class Domain:
    """A text in two halves: one to calibrate on, one to test on."""

    name: str
    calibration: tuple[Document, ...]
    heldout: tuple[Document, ...]
    unit: str
    """What statistics are paired by: documents, or passages of few documents."""


def read_domains(tokenizer: Any, settings: EvalSettings) -> list[tuple[Domain, Windows]]:
    """Each domain with the windows of it that are tested on.

    Raises LeanMoeError, before anything is measured, for a text that is too short to judge by.
    """
    found = []
    for name, file in settings.domain:
        domain = read_domain(name, Path(file))
        windows = cut(
            domain.heldout, tokenizer, WINDOW_TOKENS, settings.domain_tokens, settings.seed
        )
        try:
            require_documents(windows.documents, settings.confidence)
        except LeanMoeError as error:
            raise LeanMoeError(
                f"domain {name}: {error}; give a longer text, or more than "
                f"{settings.domain_tokens} --domain-tokens"
            ) from error
        if len(windows.lengths_S) < settings.concurrency:
            raise LeanMoeError(
                f"domain {name} gives {len(windows.lengths_S)} windows: --concurrency "
                f"{settings.concurrency} needs as many"
            )
        found.append((domain, windows))
    return found


def domain_matrix(
    model: Any,
    tokenizer: Any,
    texts: Sequence[tuple[Domain, Windows]],
    plans: Sequence[Named],
    settings: EvalSettings,
    folder: RunFolder,
) -> DomainMatrix:
    """Rows: plans as given, and one calibrated on each domain; columns: the domains tested."""
    rows = [*plans]
    if settings.calibrate:
        rows += [_calibrated(model, tokenizer, d, settings, folder) for d, _ in texts]
    empty = Named("full model", Plan(shape_of(model).fingerprint()))
    sure = (settings.confidence, settings.seed)

    def measured(each: Named, domain: Domain, windows: Windows) -> Losses:
        key = f"domain-{domain.name}-{'full' if each is empty else each.digest}"
        what = f"{domain.name}, {each.name}"
        return Losses.from_json(folder.step(key, _measuring(model, each, what, windows, settings)))

    full = {domain.name: measured(empty, domain, windows) for domain, windows in texts}
    return DomainMatrix(
        domains=tuple(
            EvaluatedDomain(
                domain.name,
                domain.unit,
                windows.documents,
                windows.tokens,
                full[domain.name].mean,
            )
            for domain, windows in texts
        ),
        calibrate=settings.calibrate,
        rows=tuple(
            DomainRow(
                each.name,
                {
                    domain.name: loss_increase(
                        full[domain.name], measured(each, domain, windows), *sure
                    )
                    for domain, windows in texts
                },
            )
            for each in rows
        ),
    )


def read_domain(name: str, path: Path) -> Domain:
    """The text of `path`, its first half of each document to calibrate on if they are few.

    Many documents: every other one. Few: passages, the first half of each document's and the
    rest, so that no passage is in both; every other one of documents that are a passage each.
    """
    documents = read_corpus(str(path)).documents
    if len(documents) >= FEWEST_DOCUMENTS:
        return Domain(name, documents[::2], documents[1::2], "documents")
    first: list[Document] = []
    rest: list[Document] = []
    single = 0
    for document in documents:
        passages = _passages(document)
        half = (len(passages) + 1) // 2
        if len(passages) == 1:  # as the sections of a plain file are
            half = 1 - single % 2
            single += 1
        first += passages[:half]
        rest += passages[half:]
    if not rest:
        raise LeanMoeError(f"domain {name}: {path} is too short to be cut into two halves")
    return Domain(name, tuple(first), tuple(rest), "passages")


def _passages(document: Document) -> list[Document]:
    """The document's paragraphs, gathered until a passage is long enough; half of one is none."""
    *passages, rest = sections(document.text, "\n")
    if len(rest.replace("\n", "")) >= SECTION_CHARACTERS // 2:
        passages.append(rest)
    return [Document(f"{document.name}, passage {n}", text) for n, text in enumerate(passages)]


def _calibrated(
    model: Any, tokenizer: Any, domain: Domain, settings: EvalSettings, folder: RunFolder
) -> Named:
    """Experts ranked on the domain's calibration half."""
    name, keep = settings.calibration()
    criterion, shape = CRITERIA[name], shape_of(model)
    count = kept_count(keep, shape)

    def rank() -> Any:
        windows = cut(
            domain.calibration, tokenizer, WINDOW_TOKENS, settings.domain_tokens, settings.seed
        )
        if not criterion.needs_text:
            return best_experts(rank_experts(criterion, shape, settings.seed), count, shape)
        seen = observe(model, windows)
        scores = rank_experts(criterion, shape, settings.seed, model, windows, count, seen)
        return best_experts(scores, count, shape, tuple(seen.super_experts()))

    stored = folder.step(f"calibrated-{domain.name}", rank)
    kept = tuple(tuple(int(expert) for expert in layer) for layer in stored)
    return Named(f"{name} {keep}, calibrated on {domain.name}", as_plan(kept, shape))


def _measuring(
    model: Any, each: Named, what: str, windows: Windows, settings: EvalSettings
) -> Callable[[], Any]:
    def compute() -> Any:
        decode_batch = settings.concurrency
        with apply(model, each.plan, experts=served_experts(model), decode_batch=decode_batch):
            return losses(model, windows, what, decode_batch).to_json()

    return compute
