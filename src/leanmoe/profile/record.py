"""One pass of a model over text that counts what its router chooses.

Letters: N windows, L tokens in a window or MoE layers, T tokens, E experts.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from leanmoe.core.provenance import collect
from leanmoe.profile.replay import distinct_curve
from leanmoe.profile.router_statistics import LayerStatistics
from leanmoe.profile.saved import Profile, Trace
from leanmoe.runtime import find_layers, record, shape_of
from leanmoe.scoring.forward import hidden_of
from leanmoe.scoring.windows import BATCH_TOKENS, Batch, Windows

TRACE_TOKENS = 16384


def profile(
    model: Any,
    windows: Windows,
    trace_tokens: int = TRACE_TOKENS,
    batch_tokens: int = BATCH_TOKENS,
    seed: int = 0,
    command: str = "profile",
) -> Profile:
    """Runs `model` over `windows` once and counts, per MoE layer, what its router chooses.

    Router logits of about `trace_tokens` tokens are kept (float16, 2 L E bytes each), as many of
    each document as of any other, none of them a window's first token: that is the only one that
    is never part of a decode step. Nothing but an empty plan may be applied at the time.

    Raises LeanMoeError, naming the layer, when a router logit is not a finite number.
    """
    shape = shape_of(model)
    layers = find_layers(model)
    biases = [layer.ranking_bias(shape.router) for layer in layers]
    statistics = [
        LayerStatistics(shape.router, shape.experts, shape.top_k, bias) for bias in biases
    ]
    sample = _Sample(windows, trace_tokens, seed)
    caught: dict[int, Tensor] = {}

    def sink(layer: int, logits_TE: Tensor) -> None:
        caught[layer] = logits_TE

    with record(model, sink):
        for batch, _ in hidden_of(model, windows, "Profile", batch_tokens):
            real_T = batch.mask_NL.reshape(-1)
            logits_LTE = [
                caught.pop(n).reshape(-1, shape.experts)[real_T] for n in range(len(layers))
            ]
            for counts, logits_TE in zip(statistics, logits_LTE, strict=True):
                counts.add(logits_TE)
            sample.add(batch, logits_LTE)
    measured = Profile(
        model=shape.fingerprint(),
        router=shape.router,
        decoder_indices=tuple(layer.decoder_index for layer in layers),
        tokens=windows.tokens,
        documents=windows.documents,
        layers=tuple(counts.result() for counts in statistics),
        distinct=(),
        trace=sample.trace(),
        bias_LE=_stack(biases),
        provenance=collect(command, seed).to_json(),
    )
    curves = tuple(distinct_curve(measured, layer, seed) for layer in range(len(layers)))
    return replace(measured, distinct=curves)


class _Sample:
    """Router logits of a sample of tokens, gathered batch by batch."""

    def __init__(self, windows: Windows, tokens: int, seed: int) -> None:
        self._windows = windows
        self._chosen_NL = _choose(windows, tokens, seed)
        self._logits: list[Tensor] = []
        self._rows: list[Tensor] = []
        self._positions: list[Tensor] = []

    def add(self, batch: Batch, logits_LTE: list[Tensor]) -> None:
        """Keeps the chosen ones of a batch's tokens [T], padding left out."""
        width = batch.ids_NL.shape[1]
        chosen_NL = self._chosen_NL[batch.rows_N, :width]
        chosen_T = chosen_NL[batch.mask_NL]
        self._logits.append(torch.stack([logits[chosen_T].half().cpu() for logits in logits_LTE]))
        rows, positions = chosen_NL.nonzero(as_tuple=True)
        self._rows.append(batch.rows_N[rows])
        self._positions.append(positions)

    def trace(self) -> Trace:
        """All that was kept, sorted by document."""
        rows_T, positions_T = torch.cat(self._rows), torch.cat(self._positions)
        documents_T = self._windows.documents_N[rows_T]
        order_T = documents_T.argsort(stable=True)
        logits_LTE = torch.cat(self._logits, dim=1)[:, order_T]
        return Trace(
            logits_LTE.numpy(),
            documents_T[order_T].numpy().astype(np.int32),
            positions_T[order_T].numpy().astype(np.int32),
        )


def _choose(windows: Windows, tokens: int, seed: int) -> Tensor:
    """True [N, L] at about `tokens` tokens: equally many of each document, while it has them."""
    draw = torch.Generator().manual_seed(seed)
    possible_NL = windows.mask.clone()
    possible_NL[:, 0] = False
    rows, positions = possible_NL.nonzero(as_tuple=True)
    shuffled = torch.randperm(len(rows), generator=draw)
    documents = windows.documents_N[rows[shuffled]]
    by_document = documents.argsort(stable=True)
    sizes = torch.bincount(documents, minlength=windows.documents)
    starts = sizes.cumsum(0) - sizes
    turn = torch.arange(len(rows)) - starts.repeat_interleave(sizes)
    kept = shuffled[by_document][turn.argsort(stable=True)[:tokens]]
    chosen_NL = torch.zeros_like(possible_NL)
    chosen_NL[rows[kept], positions[kept]] = True
    return chosen_NL


def _stack(biases: list[Tensor | None]) -> Any:
    found = [bias.detach().float().cpu() for bias in biases if bias is not None]
    return torch.stack(found).numpy() if found else None
