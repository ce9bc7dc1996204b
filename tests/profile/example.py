"""A profile of made-up router logits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from leanmoe.models.families import Router
from leanmoe.plan import Fingerprint
from leanmoe.profile.record import count_choices, distinct_curve
from leanmoe.profile.saved import Profile, Trace

EXPERTS, TOP_K, LAYERS, DOCUMENTS, EACH = 16, 4, 2, 12, 40


def made_up_profile(alike: float = 0.0, bias: bool = True) -> Profile:
    """`alike` is how far tokens of a document prefer the same experts."""
    draw = np.random.default_rng(0)
    document_T = np.repeat(np.arange(DOCUMENTS, dtype=np.int32), EACH)
    shared = draw.normal(size=(LAYERS, DOCUMENTS, EXPERTS))[:, document_T]
    own = draw.normal(size=(LAYERS, len(document_T), EXPERTS))
    logits_LTE = (alike * shared + own).astype(np.float16)
    router = Router("sigmoid", "bias" if bias else None)
    bias_LE = draw.normal(0, 0.1, (LAYERS, EXPERTS)).astype(np.float32) if bias else None
    use, mass = [], []
    for layer in range(LAYERS):
        bias_E = None if bias_LE is None else torch.from_numpy(bias_LE[layer])
        logits_TE = torch.from_numpy(logits_LTE[layer]).float()
        use_E, mass_K = count_choices(logits_TE, router, TOP_K, bias_E)
        use.append(use_E)
        mass.append(mass_K / len(document_T))
    made = Profile(
        model=Fingerprint("MadeUpForCausalLM", LAYERS + 1, LAYERS, EXPERTS, TOP_K),
        router=router,
        decoder_indices=(1, 2),
        tokens=len(document_T),
        documents=DOCUMENTS,
        use_LE=torch.stack(use).numpy(),
        mass_LK=torch.stack(mass).numpy(),
        distinct=(),
        trace=Trace(logits_LTE, document_T, np.tile(np.arange(EACH, dtype=np.int32), DOCUMENTS)),
        bias_LE=bias_LE,
        provenance={"command": "test"},
    )
    return replace(made, distinct=tuple(distinct_curve(made, layer) for layer in range(LAYERS)))
