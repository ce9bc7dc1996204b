"""What a run works on: the model, and text cut into a part to search on and a part to prove on."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

from leanmoe.core.errors import LeanMoeError
from leanmoe.core.quiet import quiet_transformers
from leanmoe.core.text import Document, read_corpus, split
from leanmoe.models.shape import MoEShape
from leanmoe.prune.kept_experts import Kept
from leanmoe.runtime import find_layers, load_model, shape_of, why_not_full_attention
from leanmoe.scoring.windows import Windows, cut
from leanmoe.stats.paired import require_documents
from leanmoe.tune.settings import TuneSettings

FEWEST_COMPARED = 40
"""Windows for the table of strategies, if there are so many; each of the first has a document."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Inputs:
    """A loaded model and the windows of text each step uses."""

    model: Any
    shape: MoEShape
    source: str
    profiled: Windows
    searched: Windows
    """Calibration text for sensitivities; the first part of each window is its prompt."""
    proved: Windows
    """Held-out text; the search never sees it."""
    compared: Windows
    """Part of it, for the table of strategies."""
    prompts: list[list[int]]
    """Held-out prompts for the load."""
    counts: dict[str, dict[str, int]]
    kept: Kept | None = None
    """The experts that every plan is restricted to, where there is a memory budget."""


def read_inputs(settings: TuneSettings) -> Inputs:
    """Loads and checks everything before any expensive work.

    Raises LeanMoeError for a model that cannot be run and for text that is too short.
    """
    quiet_transformers()
    corpus = read_corpus(settings.text)
    calibration, heldout = split(corpus.documents, settings.heldout_share, settings.seed)
    model, tokenizer = load_model(settings.model, settings.dtype, settings.trust_remote_code)
    find_layers(model)
    reason = why_not_full_attention(model.config)
    if reason:
        logger.info("every reply is scored in a row of its own: %s", reason)
    whole, prompt, reply = settings.scored_window(reason is None)
    searched = full_windows(calibration, tokenizer, whole, settings.sensitivity_tokens, settings)
    proved = full_windows(heldout, tokenizer, whole, settings.heldout_tokens, settings)
    some = int(settings.compared_share * settings.heldout_tokens)
    some = min(max(some, FEWEST_COMPARED * whole), settings.heldout_tokens)
    compared = full_windows(heldout, tokenizer, whole, some, settings)
    require_documents(compared.documents, settings.confidence)
    decode_batch = max(settings.concurrency)
    for name, windows in (("calibration", searched), ("held-out", compared)):
        if len(windows.lengths_S) < decode_batch:
            raise LeanMoeError(
                f"the {name} text gives {len(windows.lengths_S)} windows of {whole} tokens: "
                f"{decode_batch} are needed for {decode_batch} requests at once; give more text"
            )
    return Inputs(
        model=model,
        shape=shape_of(model),
        source=corpus.source,
        profiled=cut(calibration, tokenizer, whole, settings.profile_tokens, settings.seed),
        searched=searched.after_prompt(prompt, reply),
        proved=proved.after_prompt(prompt, reply),
        compared=compared.after_prompt(prompt, reply),
        prompts=_prompts(heldout, tokenizer, settings.input_len, 2 * decode_batch),
        counts={
            "calibration": {"documents": len(calibration), "tokens": searched.tokens},
            "heldout": {"documents": proved.documents, "tokens": proved.tokens},
        },
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
    found = cut(documents, tokenizer, length, None, settings.seed)
    chosen = (found.lengths_S == length).nonzero().flatten()
    if not len(chosen):
        raise LeanMoeError(
            f"the text is too short: none of its {len(documents)} documents has {length} tokens"
        )
    chosen = chosen[: math.ceil(tokens / length)]
    used = sorted(set(found.documents_S[chosen].tolist()))
    renumbered = {number: n for n, number in enumerate(used)}
    numbers = [renumbered[number] for number in found.documents_S[chosen].tolist()]
    return Windows(
        found.ids_SN[chosen],
        found.lengths_S[chosen],
        found.documents_S.new_tensor(numbers),
        tuple(found.names[number] for number in used),
        settings.seed,
    )


def _prompts(
    documents: tuple[Document, ...], tokenizer: Any, length: int, wanted: int
) -> list[list[int]]:
    prompts: list[list[int]] = []
    for document in documents:
        ids: list[int] = tokenizer(document.text, add_special_tokens=False, verbose=False)[
            "input_ids"
        ]
        prompts += [ids[n : n + length] for n in range(0, len(ids) - length + 1, length)]
        if len(prompts) >= wanted:
            return prompts[:wanted]
    if not prompts:
        raise LeanMoeError(
            f"the text is too short: no held-out document has the {length} tokens of a prompt"
        )
    return prompts
