"""What each layer loses under each candidate rule: one layer changed at a time.

The hidden states before the changed layer are those of the full model, so they are computed once
and every candidate runs from its own layer on.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from leanmoe.core.progress import bar
from leanmoe.plan import Fingerprint
from leanmoe.runtime import IMPLEMENTATION, apply, find_layers, resume_from
from leanmoe.runtime.resume import keep_hidden
from leanmoe.scoring.divergence import Reference, reference
from leanmoe.scoring.forward import final_hidden
from leanmoe.scoring.windows import Batch, Windows
from leanmoe.stats.documents import Divergence
from leanmoe.tune.candidates import Candidate, Phase

BATCH_TOKENS = 8192


@dataclass(frozen=True)
class Sensitivity:
    """What a candidate costs in next-token prediction, and what it activates."""

    candidate: Candidate
    divergence: float
    """KL from the full model, nats per predicted token."""
    loss_difference: float
    """Next-token loss over the full model's, nats per predicted token."""
    slots: float
    """Mean experts a token of the candidate's phase uses in its layer."""
    distinct: float
    """Mean distinct experts a step of the candidate's phase wakes in its layer."""

    def to_json(self) -> dict[str, Any]:
        """The measurement as JSON values."""
        return {
            **self.candidate.to_json(),
            "divergence": self.divergence,
            "loss_difference": self.loss_difference,
            "slots": self.slots,
            "distinct": self.distinct,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Sensitivity:
        """Reads what `to_json` wrote."""
        names = ("divergence", "loss_difference", "slots", "distinct")
        return cls(Candidate.from_json(value), *(float(value[name]) for name in names))


LEAST_RATE = 0.1
"""Nats of loss for a nat of divergence, at least: no rule is taken to be free."""


def loss_rates(sensitivities: Sequence[Sensitivity]) -> dict[tuple[Phase, int], float]:
    """Nats of next-token loss that a nat of divergence comes to, by phase and layer.

    Divergence is far less noisy than loss over few tokens and ranks the rules of a layer; but it
    also counts changes that do the loss no harm, and in some layers it counts little else. The
    median ratio over a layer's candidates puts its divergences in the unit of the margin.
    """
    ratios: dict[tuple[Phase, int], list[float]] = {}
    for found in sensitivities:
        where = (found.candidate.phase, found.candidate.layer)
        known = ratios.setdefault(where, [])
        if found.divergence > 0:
            known.append(found.loss_difference / found.divergence)
    return {
        where: max(statistics.median(found), LEAST_RATE) if found else 1.0
        for where, found in ratios.items()
    }


def measure(
    model: Any,
    windows: Windows,
    tried: Sequence[Candidate],
    fingerprint: Fingerprint,
    what: str = "Sensitivity",
) -> list[Sensitivity]:
    """Measures every candidate on the windows' tokens after their prompt.

    Candidates of one `together` share their batches; see `candidates.candidates`.
    """
    against = reference(model, windows, BATCH_TOKENS)
    found: dict[Candidate, Sensitivity] = {}
    with bar(what, len(tried) * windows.tokens, "tokens") as advance:
        for together in sorted({candidate.together for candidate in tried}):
            group = [c for c in tried if c.together == together]
            for result in _group(model, against, group, fingerprint, together, advance):
                found[result.candidate] = result
    return [found[candidate] for candidate in tried]


@torch.inference_mode()
def _group(
    model: Any,
    against: Reference,
    group: Sequence[Candidate],
    fingerprint: Fingerprint,
    together: int,
    advance: Any,
) -> Iterable[Sensitivity]:
    layers = find_layers(model)
    sums: dict[Candidate, list[Divergence]] = {candidate: [] for candidate in group}
    counted: dict[Candidate, list[tuple[int, int, float, int]]] = {c: [] for c in group}
    for batch in against.windows.batches(BATCH_TOKENS, together):
        with keep_hidden(model, [layer.decoder_index for layer in layers]) as kept:
            final_hidden(model, batch)
        hidden = dict(kept)
        for candidate in group:
            index = layers[candidate.layer].decoder_index
            with (
                resume_from(model, index, hidden[index]),
                apply(
                    model,
                    candidate.plan(fingerprint),
                    experts=IMPLEMENTATION,
                    decode_batch=together,
                    prompt_tokens=batch.prompt_in_call,
                    count=True,
                ) as applied,
            ):
                final = final_hidden(model, batch)
            sums[candidate].append(against.compare(batch, final))
            counts = applied.prompt if candidate.phase == "prompt" else applied.generated
            layer = counts[candidate.layer]
            counted[candidate].append((layer.tokens, layer.slots, layer.distinct, layer.steps))
            advance(_tokens(batch))
    for candidate in group:
        first, *others = sums[candidate]
        total = sum(others, start=first)
        tokens, slots, distinct, steps = (
            sum(part) for part in zip(*counted[candidate], strict=True)
        )
        yield Sensitivity(
            candidate,
            total.mean_kl,
            total.loss_difference,
            slots / max(tokens, 1),
            distinct / max(steps, 1),
        )


def _tokens(batch: Batch) -> int:
    return batch.tokens
