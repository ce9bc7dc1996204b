"""What goes first when experts are removed by the error of the layer's output."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from leanmoe.prune.output_error import removal_order
from leanmoe.runtime import find_layers, record, shape_of
from tests import tiny

IDS = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(5))


def test_output_error_drops_first_whom_nobody_uses() -> None:
    model = tiny.build("deepseek_v3")
    layer, shape = find_layers(model)[0], shape_of(model)
    caught: dict[str, Any] = {}

    def catch(_module: Any, inputs: Any, _output: Any) -> None:
        caught["hidden"], caught["ids"] = inputs[0], inputs[1]

    layer.experts.register_forward_hook(catch)
    with (
        torch.inference_mode(),
        record(model, lambda _n, logits: caught.__setitem__("logits", logits)),
    ):
        model(input_ids=IDS, use_cache=False)
    used = set(caught["ids"][:6].flatten().tolist())
    scores = removal_order(
        layer, shape.router, 4, caught["hidden"][:6], caught["logits"][:6], 16 - len(used)
    )
    unused = 16 - len(used)
    assert 0 < unused < 16
    assert not set(np.argsort(scores, kind="stable")[: min(unused, len(used))].tolist()) & used
    assert (scores == 16).sum() == 16 - len(used)
