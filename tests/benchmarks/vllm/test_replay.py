"""Drawn logits: their shares, their seeds, and where the reference model's use stands."""

from __future__ import annotations

import json

import numpy as np
import torch

from benchmarks.vllm.replay import USE, Replay, reference_use

EXPERTS, ROWS = 16, 4000


def test_the_use_of_the_reference_models_experts_is_in_the_package_with_its_source() -> None:
    use_LE = np.array(reference_use())
    assert use_LE.shape == (6, 64)
    np.testing.assert_allclose(use_LE.sum(axis=1), 1.0)
    assert "leanmoe tune reference" in json.loads(USE.read_text())["source"]


def drawn(routing: str, seed: int, rank: int = 0) -> torch.Tensor:
    replay = Replay(EXPERTS, ROWS, reference_use())
    replay.data_rank = rank
    logits_TE = replay.logits(0, torch.empty(ROWS, EXPERTS))
    replay.draw(routing, seed)
    return logits_TE


def test_uniform_logits_choose_experts_evenly_and_skewed_ones_do_not() -> None:
    for routing, is_even in (("uniform", True), ("skewed", False)):
        use_E = np.bincount(drawn(routing, 0).argmax(-1).numpy(), minlength=EXPERTS) / ROWS
        assert (float(use_E.std()) < 0.006) == is_even


def test_a_seed_draws_the_same_again_and_ranks_have_tokens_of_their_own() -> None:
    assert torch.equal(drawn("skewed", 1), drawn("skewed", 1))
    assert not torch.equal(drawn("skewed", 1), drawn("skewed", 2))
    assert not torch.equal(drawn("skewed", 1), drawn("skewed", 1, rank=1))
