"""What the stages of a run share: the model, its text, its profile, and the folder they store in.

Text is cut into a part to search on and a part to prove on, which the search never sees.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from leanmoe.core.errors import LeanMoeError
from leanmoe.core.quiet import quiet_transformers
from leanmoe.core.run_folder import RunFolder
from leanmoe.core.schema import from_json, to_json
from leanmoe.core.text import Document, read_corpus, split
from leanmoe.models.shape import MoEShape
from leanmoe.plan import Fingerprint, Plan, Rule
from leanmoe.profile.record import Replay, replay
from leanmoe.profile.record import profile as measure_profile
from leanmoe.profile.saved import Profile
from leanmoe.runtime import (
    IMPLEMENTATION,
    apply,
    batching_reason,
    find_layers,
    load_model,
    partial_attention_reason,
    shape_of,
)
from leanmoe.scoring.divergence import losses
from leanmoe.scoring.windows import Windows, cut
from leanmoe.stats.losses import Losses
from leanmoe.stats.paired import require_documents
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
FULL_LOSSES = Stage("full")
LAYER_TIMES = Stage("layer-times", timed=True)
EXPERTS_KEPT = Stage("experts-kept")
VALIDATION = Stage("validation")
STRATEGY = Stage("strategy")
TOTAL_OR_ACTIVATED = Stage("total")
GAIN = Stage("gain", timed=True)


@dataclass(frozen=True)
class TuneWindows:
    """The windows of text that each stage uses."""

    source: str
    profiled: Windows
    searched: Windows
    """Calibration text for sensitivities; the first part of each window is its prompt."""
    proved: Windows
    """Held-out text; the search never sees it."""
    compared: Windows
    """Part of it, for the table of strategies."""
    calibration_documents: int


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
    corpus = read_corpus(settings.text)
    calibration, heldout = split(corpus.documents, settings.heldout_share, settings.seed)
    model, tokenizer = load_model(settings.model, settings.dtype, settings.trust_remote_code)
    find_layers(model)
    if why := batching_reason(model):
        print(f"leanmoe: the gain will not be measured: {why}", file=sys.stderr)
    text = _cut_text(corpus.source, calibration, heldout, tokenizer, settings, model)
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


def _cut_text(
    source: str,
    calibration: tuple[Document, ...],
    heldout: tuple[Document, ...],
    tokenizer: Any,
    settings: TuneSettings,
    model: Any,
) -> TuneWindows:
    reason = partial_attention_reason(model.config)
    if reason:
        logger.info("every reply is scored in a row of its own: %s", reason)
    whole, prompt, reply = settings.scored_window(reason is None)
    searched = full_windows(calibration, tokenizer, whole, settings.sensitivity_tokens, settings)
    proved = full_windows(heldout, tokenizer, whole, settings.heldout_tokens, settings)
    some = int(settings.compared_share * settings.heldout_tokens)
    some = min(max(some, FEWEST_COMPARED * whole), settings.heldout_tokens)
    compared = full_windows(heldout, tokenizer, whole, some, settings)
    require_documents(compared.documents, settings.confidence)
    concurrency = max(settings.concurrency)
    given = (
        ("calibration", searched, settings.sensitivity_tokens, "--sensitivity-tokens"),
        ("held-out", compared, some, "--heldout-tokens"),
    )
    for name, windows, tokens, option in given:
        count = len(windows.lengths_S)
        if count < concurrency:
            # As many windows as the tokens make: there may be more text.
            mend = f"more {option}" if count == math.ceil(tokens / whole) else "more text"
            raise LeanMoeError(
                f"the {name} text gives {count} windows of {whole} tokens: "
                f"{concurrency} are needed for concurrency {concurrency}; give {mend}"
            )
    return TuneWindows(
        source=source,
        profiled=cut(calibration, tokenizer, whole, settings.profile_tokens, settings.seed),
        searched=searched.after_prompt(prompt, reply),
        proved=proved.after_prompt(prompt, reply),
        compared=compared.after_prompt(prompt, reply),
        calibration_documents=len(calibration),
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
    )
