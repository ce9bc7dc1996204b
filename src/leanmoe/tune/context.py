"""What the stages of a run share: the model, its text, its profile, and the folder they store in.

Text is cut into a part to search on and a part to prove on, which the search never sees.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from leanmoe.core.errors import LeanMoeError
from leanmoe.core.quiet import quiet_transformers
from leanmoe.core.run_folder import RunFolder
from leanmoe.core.schema import from_json, to_json
from leanmoe.core.text import Corpus, Document, overlap, read_kinds, split
from leanmoe.models.shape import MoEShape
from leanmoe.plan import Fingerprint, Plan, Rule
from leanmoe.profile.record import Replay, replay
from leanmoe.profile.record import profile as measure_profile
from leanmoe.profile.saved import Profile
from leanmoe.results.tune import KindOfText, TextPart
from leanmoe.runtime import (
    IMPLEMENTATION,
    Applied,
    apply,
    batching_reason,
    find_layers,
    load_model,
    partial_attention_reason,
    shape_of,
)
from leanmoe.scoring.divergence import Reference, divergence, losses, reference
from leanmoe.scoring.windows import Windows, cut
from leanmoe.stats.losses import Divergence, Losses
from leanmoe.stats.paired import rarest_harm_seen, require_documents
from leanmoe.tune.settings import TuneSettings

BATCH_TOKENS = 8192
"""Tokens of a forward call that scores text."""
FEWEST_COMPARED = 40
"""Windows for the table of strategies, if there are so many; each of the first has a document."""
logger = logging.getLogger(__name__)


Result = TypeVar("Result")


@dataclass(frozen=True)
class Stage:
    """A kind of step that a run stores; a key of the folder is its name and what it is about.

    What a result depends on beside the settings must be part of its key: rules by their digest.
    """

    name: str
    timed: bool = False
    """Whether results hold times, which no other machine shares."""


PROFILE = Stage("profiling")
SENSITIVITY = Stage("sensitivity")
RENORMALISE = Stage("renormalise")
FULL_LOSSES = Stage("full")
LAYER_TIMES = Stage("layer-times", timed=True)
EXPERTS_KEPT = Stage("experts-kept")
VALIDATION = Stage("validation")
STRATEGY = Stage("strategy")
TOTAL_OR_ACTIVATED = Stage("total")
GAIN = Stage("gain", timed=True)
REPLIES = Stage("replies")


@dataclass(frozen=True)
class TuneWindows:
    """The windows of text that each stage uses."""

    profiled: Windows
    searched: Windows
    """Calibration text for sensitivities; the first part of each window is its prompt."""
    proved: Mapping[str, Windows]
    """Held-out text by kind; the search never sees it."""
    compared: Windows
    """Part of it, for the table of strategies."""
    kinds: tuple[KindOfText, ...]
    calibration: TextPart


@dataclass(frozen=True)
class TuneContext:
    """Made once, before the first stage; nothing of it changes."""

    settings: TuneSettings
    folder: RunFolder
    command: str
    model: Any
    shape: MoEShape
    text: TuneWindows
    profile: Profile
    _replays: dict[tuple[int, Rule, int, int | None], Replay] = field(default_factory=dict)
    _references: dict[str, Reference] = field(default_factory=dict)

    @property
    def fingerprint(self) -> Fingerprint:
        """The model's, as plans hold it."""
        return self.shape.fingerprint()

    @property
    def no_rules(self) -> tuple[Rule, ...]:
        """The full model's: an empty rule for each layer."""
        return (Rule(),) * self.profile.model.moe_layers

    def take(
        self, stage: Stage, kind: type[Result], compute: Callable[[], Result], *about: object
    ) -> Result:
        """The stored result of a stage for what it is `about`, or a computed one, then stored."""
        key = "-".join(map(str, (stage.name, *about)))
        stored = self.folder.step(key, lambda: to_json(compute()), stage.timed)
        return from_json(kind, stored, f"step {key}")

    def activity(
        self, layer: int, rule: Rule, tokens_in_step: int, steps: int | None = None
    ) -> Replay:
        """What steps of the profiled text activate in a layer under a rule; replayed once."""
        key = (layer, rule, tokens_in_step, steps)
        if key not in self._replays:
            self._replays[key] = replay(self.profile, layer, rule, tokens_in_step, steps)
        return self._replays[key]

    def activities(self, rules: Sequence[Rule], tokens_in_step: int) -> list[Replay]:
        """The same for one rule per layer."""
        return [self.activity(n, rule, tokens_in_step) for n, rule in enumerate(rules)]

    def divergence(
        self, kind: str, plan: Plan, decode_batch: int, draw: int, what: str
    ) -> Divergence:
        """What changes under `plan` on the held-out text of a kind, in batches drawn anew."""
        against = self.reference(kind, self.text.proved[kind])
        with apply(
            self.model,
            plan,
            experts=IMPLEMENTATION,
            decode_batch=decode_batch,
            prompt_tokens=against.windows.prompt_in_call,
        ):
            return divergence(self.model, against, what, decode_batch, BATCH_TOKENS, draw)

    def reference(self, name: str, windows: Windows) -> Reference:
        """What the full model predicts on the text of that name, by the experts plans run with."""
        if name not in self._references:
            with self.full():
                self._references[name] = reference(self.model, windows, BATCH_TOKENS)
        return self._references[name]

    def full(self) -> AbstractContextManager[Applied]:
        """The full model, computed by the same kernels as any plan."""
        return apply(self.model, Plan(self.fingerprint), experts=IMPLEMENTATION)

    def losses(self, windows: Windows, plan: Plan, decode_batch: int | None, what: str) -> Losses:
        """Next-token loss per document under `plan`, `decode_batch` requests decoding at once."""
        with apply(
            self.model,
            plan,
            experts=IMPLEMENTATION,
            decode_batch=decode_batch,
            prompt_tokens=windows.prompt_in_call,
        ):
            return losses(self.model, windows, what, decode_batch, BATCH_TOKENS)


def prepare(settings: TuneSettings, folder: RunFolder, command: str) -> TuneContext:
    """Loads and checks everything before any expensive work; then profiles, or reads the profile.

    Raises LeanMoeError for a model that cannot be run and for text that is too short.
    """
    quiet_transformers()
    kinds = read_kinds(settings.sources_of_text())
    model, tokenizer = load_model(settings.model, settings.dtype, settings.trust_remote_code)
    find_layers(model)
    if why := batching_reason(model):
        print(f"leanmoe: the gain will not be measured: {why}", file=sys.stderr)
    text = _cut_text(kinds, tokenizer, settings, model)
    folder.step(PROFILE.name, lambda: _record(model, text, folder, settings, command))
    profile = Profile.load(folder.path)
    return TuneContext(settings, folder, command, model, shape_of(model), text, profile)


def digest(rules: Sequence[Rule], *more: object) -> str:
    """A short name for one rule per layer, and for what else a stored result depends on."""
    value = [[rule.to_json() for rule in rules], *more]
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]


def _record(
    model: Any, text: TuneWindows, folder: RunFolder, settings: TuneSettings, command: str
) -> dict[str, int]:
    """Stores the profile in files of its own; what it was read from is the step's result."""
    with apply(model, Plan(shape_of(model).fingerprint()), experts=IMPLEMENTATION):
        measured = measure_profile(model, text.profiled, seed=settings.seed, command=command)
    measured.save(folder.path)
    return {"tokens": measured.tokens, "documents": measured.documents}


@dataclass(frozen=True)
class _Cut:
    """How windows are cut: of a length, with a prompt and replies, and so many of each kind."""

    tokenizer: Any
    settings: TuneSettings
    whole: int
    prompt: int
    reply: int
    kinds: int

    def windows(self, documents: Sequence[Document], tokens: int) -> Windows:
        """Full windows of a kind's share of the tokens, scored behind their prompts."""
        share = math.ceil(tokens / self.kinds)
        cut = full_windows(tuple(documents), self.tokenizer, self.whole, share, self.settings)
        return cut.after_prompt(self.prompt, self.reply)


def _cut_text(
    kinds: Mapping[str, Corpus], tokenizer: Any, settings: TuneSettings, model: Any
) -> TuneWindows:
    reason = partial_attention_reason(model.config)
    if reason:
        logger.info("every reply is scored in a row of its own: %s", reason)
    shape = settings.scored_window(reason is None)
    cut_by = _Cut(tokenizer, settings, *shape, len(kinds))
    parts, proved = _kinds_that_suffice(kinds, cut_by)
    some = int(settings.compared_share * settings.heldout_tokens)
    some = min(max(some, FEWEST_COMPARED * shape[0]), settings.heldout_tokens)
    searched = [cut_by.windows(c, settings.sensitivity_tokens) for c, _ in parts.values()]
    compared = Windows.joined([cut_by.windows(h, some) for _, h in parts.values()])
    calibration = tuple(document for part, _ in parts.values() for document in part)
    _require_windows(Windows.joined(searched), settings.sensitivity_tokens, settings)
    return TuneWindows(
        profiled=Windows.joined(
            [
                cut(c, tokenizer, shape[0], settings.profile_tokens // len(parts), settings.seed)
                for c, _ in parts.values()
            ]
        ),
        searched=Windows.joined(searched),
        proved=proved,
        compared=compared,
        kinds=tuple(
            KindOfText(
                kind,
                kinds[kind].source,
                text_part(windows),
                overlap(parts[kind][1], calibration),
                rarest_harm_seen(windows.units, settings.confidence),
            )
            for kind, windows in proved.items()
        ),
        calibration=text_part(Windows.joined(searched)),
    )


Halves = tuple[tuple[Document, ...], tuple[Document, ...]]


def _kinds_that_suffice(
    kinds: Mapping[str, Corpus], cut_by: _Cut
) -> tuple[dict[str, Halves], dict[str, Windows]]:
    """Both halves of each kind, and the windows of its held-out half.

    A built-in kind that this machine has too little of is left out, and said; raises LeanMoeError
    for one that was asked for, and where none is left.
    """
    settings = cut_by.settings
    parts: dict[str, Halves] = {}
    proved: dict[str, Windows] = {}
    for kind, corpus in kinds.items():
        try:
            halves = split(corpus.documents, settings.heldout_share, settings.seed)
            windows = cut_by.windows(halves[1], settings.heldout_tokens)
            require_enough(windows, settings)
        except LeanMoeError as error:
            if settings.text or (kind == list(kinds)[-1] and not parts):
                raise LeanMoeError(f"text {kind}: {error}") from error
            print(f"leanmoe: {kind} is no kind of the proof: {error}", file=sys.stderr)
            continue
        parts[kind], proved[kind] = halves, windows
    return parts, proved


def text_part(windows: Windows) -> TextPart:
    """How much text some windows are of."""
    return TextPart(windows.documents, windows.tokens, windows.units)


def require_enough(
    windows: Windows, settings: TuneSettings, mend: str = "--heldout-tokens"
) -> None:
    """Raises LeanMoeError where a kind's held-out text is too little to prove anything on."""
    require_documents(windows.units, settings.confidence)
    concurrency = max(settings.concurrency)
    if len(windows.lengths_S) < concurrency:
        raise LeanMoeError(
            f"the held-out text gives {len(windows.lengths_S)} windows of "
            f"{windows.ids_SN.shape[1]} tokens: {concurrency} are needed for concurrency "
            f"{concurrency}; give more text or more {mend}"
        )


def _require_windows(searched: Windows, tokens: int, settings: TuneSettings) -> None:
    count, concurrency = len(searched.lengths_S), max(settings.concurrency)
    if count < concurrency:
        # As many windows as the tokens make: there may be more text.
        is_few = count >= math.ceil(tokens / searched.ids_SN.shape[1])
        mend = "more --sensitivity-tokens" if is_few else "more text"
        raise LeanMoeError(
            f"the calibration text gives {count} windows of {searched.ids_SN.shape[1]} tokens: "
            f"{concurrency} are needed for concurrency {concurrency}; give {mend}"
        )


def full_windows(
    documents: tuple[Document, ...],
    tokenizer: Any,
    length: int,
    tokens: int,
    settings: TuneSettings,
) -> Windows:
    """Windows without padding, at least `tokens` in all if there are; no short documents.

    Raises LeanMoeError when no document is long enough.
    """
    pieces = cut(documents, tokenizer, length, None, settings.seed)
    chosen = (pieces.lengths_S == length).nonzero().flatten()
    if not len(chosen):
        raise LeanMoeError(
            f"the text is too short: none of its {len(documents)} documents has {length} tokens"
        )
    chosen = chosen[: math.ceil(tokens / length)]
    used = sorted(set(pieces.documents_S[chosen].tolist()))
    renumbered = {number: n for n, number in enumerate(used)}
    numbers = [renumbered[number] for number in pieces.documents_S[chosen].tolist()]
    return Windows(
        pieces.ids_SN[chosen],
        pieces.lengths_S[chosen],
        pieces.documents_S.new_tensor(numbers),
        tuple(pieces.names[number] for number in used),
        settings.seed,
        sources=tuple(pieces.sources[number] for number in used),
    )
