"""How a model lies on GPUs: its weights, and what cannot be deployed."""

from __future__ import annotations

import pytest

from leanmoe.core.errors import LeanMoeError
from leanmoe.models.catalog import CONFIGS, published_shape
from leanmoe.models.shape import read_shape
from leanmoe.predict.hardware.gpus import GPUS
from leanmoe.predict.step.deployment import Deployment

H200 = GPUS["h200"]


V3 = published_shape("deepseek-ai/DeepSeek-V3")


def test_weights_on_all_gpus_are_the_models() -> None:
    whole = V3.always_bytes() + V3.parameters.embedding * 2
    whole += len(V3.moe_layers) * V3.experts * V3.expert_bytes
    # Latent attention's down-projections are on every GPU: 7,168 x (1,536 + 576) a layer, fp8.
    copied = 61 * 7168 * (1536 + 576)
    assert V3.copied_weights == copied
    everywhere = whole + 7 * copied * V3.storage.mixer_bytes
    assert Deployment(H200, 8).weight_bytes(V3) * 8 == pytest.approx(everywhere, rel=0.005)
    assert Deployment(H200, 1, 8, 8).weight_bytes(V3) > Deployment(H200, 8).weight_bytes(V3)


@pytest.mark.parametrize(
    ("place", "says"),
    [
        (Deployment(H200, 4), r"does not fit 4 x h200.*GB short in all"),
        (Deployment(H200, 3), r"--tensor-parallel-size 3 does not divide 128 attention heads"),
        (Deployment(H200, 8, expert=3), r"--expert-parallel-size 3 does not divide 8 GPUs"),
        (Deployment(H200, 8, pipeline=80), r"more than the model's 61 layers"),
        (Deployment(H200, 0), r"--tensor-parallel-size is 0"),
        (Deployment(H200, 8, data=4096), r"at most 16384"),
    ],
)
def test_what_cannot_be_deployed(place: Deployment, says: str) -> None:
    with pytest.raises(LeanMoeError, match=says):  # noqa: PT012, either may refuse
        place.check(V3)
        place.memory(V3)


def test_bytes_that_cannot_be_told_are_not_predicted_from() -> None:
    config = {**CONFIGS["deepseek-ai/DeepSeek-V3"], "quantization_config": {"quant_method": "new"}}
    with pytest.raises(LeanMoeError, match=r"cannot be told: .*'new' is not known"):
        Deployment(H200, 8).check(read_shape(config, "a model"))
