"""Packed weights: bf16 where nothing is lost, padding of zeros."""

from __future__ import annotations

import numpy as np
import torch

from leanmoe.kernels.cpu.packing import pack
from tests.kernels.layers import random_layer


def test_weights_that_bf16_holds_take_two_bytes() -> None:
    exact = random_layer(dtype=torch.bfloat16)
    packed, wide = pack(exact), pack(random_layer())
    assert packed.is_bf16
    assert not wide.is_bf16
    assert packed.gate_up.nbytes * 2 == wide.gate_up.nbytes


def test_every_weight_is_packed_once_and_padded_with_zeros() -> None:
    weights = random_layer()
    packed = pack(weights)
    for array, tensor in ((packed.gate_up, weights.gate_up), (packed.down, weights.down)):
        kept = np.sort(array[array != 0])
        np.testing.assert_array_equal(kept, np.sort(tensor[tensor != 0].numpy()))


def test_a_layer_without_biases_has_one_row_of_zeros() -> None:
    packed = pack(random_layer())
    assert not packed.has_bias
    assert packed.gate_up_bias.shape[0] == packed.down_bias.shape[0] == 1
    assert not packed.down_bias.any()
    assert pack(random_layer(biased=True)).has_bias
