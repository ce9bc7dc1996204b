"""Ranking a model's experts on calibration text, and writing a checkpoint or a plan without some.

Letters: L MoE layers, E experts, T tokens, D hidden width.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from leanmoe.core.errors import LeanMoeError, first_line
from leanmoe.core.files import write_json
from leanmoe.core.progress import bar
from leanmoe.core.provenance import collect
from leanmoe.core.quiet import quiet_transformers
from leanmoe.core.text import read_corpus, split
from leanmoe.models.reference import folder_of
from leanmoe.models.shape import MoEShape, read_shape
from leanmoe.prune.checkpoint import check_writable, read_source, write_pruned
from leanmoe.prune.criteria import (
    CRITERIA,
    Criterion,
    Scores,
    as_plan,
    best_experts,
    kept_count,
    observe,
    rank_experts,
)
from leanmoe.prune.settings import PruneSettings
from leanmoe.prune.trial import run_once
from leanmoe.results.prune import PruneReport, PruneResults, RankedBy
from leanmoe.runtime import load_model
from leanmoe.scoring.windows import cut

PLAN_FILE = "plan.json"


def prune(settings: PruneSettings, output: Path, command: str) -> PruneResults:
    """Ranks, chooses and writes. Raises LeanMoeError before any expensive work where it can."""
    settings.check()
    criterion = CRITERIA[settings.criterion]
    shape = read_shape(settings.model)
    count = kept_count(settings.keep, shape)
    source = None if settings.as_plan else read_source(checkpoint_folder(settings.model))
    if source is not None:
        check_writable(source, count, output)
    elif (output / PLAN_FILE).exists():
        raise LeanMoeError(f"output {output} holds a {PLAN_FILE}: give another folder")
    ranked = _rank(settings, criterion, shape, count)
    protected = ranked.protected if settings.protect else ()
    kept = best_experts(ranked.scores_LE, count, shape, protected)
    record_of = PruneReport(
        settings=asdict(settings),
        criterion=RankedBy(criterion.title, criterion.source),
        calibration_tokens=ranked.tokens,
        protected=protected,
        provenance=collect(command, settings.seed),
    ).to_json()
    if source is None:
        before = int(shape.total_bytes())
        write_json(output / PLAN_FILE, as_plan(kept, shape, record_of).to_json())
        return PruneResults(output / PLAN_FILE, shape.experts, kept, protected, before, before)
    with bar("Writing shards", len(source.shards), "shards") as advance:
        write_pruned(source, kept, output, record_of, advance)
    before = sum(source.bytes.values())
    after = sum(path.stat().st_size for path in output.glob("*.safetensors"))
    quiet_transformers()
    trial = run_once(output, after, settings.trust_remote_code)
    return PruneResults(output, shape.experts, kept, protected, before, after, trial)


def checkpoint_folder(name: str) -> Path:
    """The folder of a checkpoint's files: local, the one that ships, or fetched from the hub."""
    local = Path(folder_of(name))
    if local.is_dir():
        return local
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    files = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py"]
    try:
        return Path(snapshot_download(name, allow_patterns=files, local_files_only=True))
    except LocalEntryNotFoundError:
        print(f"leanmoe: fetching {name} from the Hugging Face Hub", file=sys.stderr)
    except Exception as error:
        raise LeanMoeError(f"model {name} is no local folder: {error}") from error
    try:
        return Path(snapshot_download(name, allow_patterns=files))
    except Exception as error:  # not found, gated, no network: the client raises many kinds
        raise LeanMoeError(f"model {name} could not be fetched: {first_line(error)}") from error


@dataclass(frozen=True)
class _Ranked:
    """Every expert's score, and what it was found by."""

    scores_LE: Scores
    protected: tuple[tuple[int, int], ...] = ()
    """Layers and experts with extreme outputs, which a model cannot lose."""
    tokens: int = 0


def _rank(settings: PruneSettings, criterion: Criterion, shape: MoEShape, count: int) -> _Ranked:
    if not criterion.needs_text:
        return _Ranked(rank_experts(criterion, shape, settings.seed))
    corpus = read_corpus(settings.text)
    quiet_transformers()
    calibration, _ = split(corpus.documents, 0.5, settings.seed)
    model, tokenizer = load_model(settings.model, settings.dtype, settings.trust_remote_code)
    windows = cut(calibration, tokenizer, tokens=settings.tokens, seed=settings.seed)
    seen = observe(model, windows)
    scores_LE = rank_experts(criterion, shape, settings.seed, model, windows, count, seen)
    return _Ranked(scores_LE, tuple(seen.super_experts()), seen.tokens)
