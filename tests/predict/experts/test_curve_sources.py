"""Curves of distinct experts from a saved profile."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from leanmoe.core.errors import LeanMoeError
from leanmoe.models.catalog import CONFIGS, published_shape
from leanmoe.models.shape import read_shape
from leanmoe.plan import Rule
from leanmoe.predict.experts.curve_sources import saved_curves
from tests.profile.example import made_up_profile

V3 = published_shape("deepseek-ai/DeepSeek-V3")


def test_a_saved_profiles_curve_needs_no_torch_and_its_own_model() -> None:
    saved = made_up_profile(alike=1.0)
    with pytest.raises(LeanMoeError, match="the profile is of another model"):
        saved_curves({"model": asdict(saved.model), "profile": saved.to_json()}, V3)
    config = {
        **CONFIGS["Qwen/Qwen3-30B-A3B"],
        "architectures": [saved.model.architecture],
        "num_hidden_layers": 3,
        "mlp_only_layers": [0],
        "num_experts": 16,
        "num_experts_per_tok": 4,
    }
    model = read_shape(config)
    curve_of = saved_curves({"model": asdict(saved.model), "profile": saved.to_json()}, model)
    full = curve_of(0, Rule())
    for point in saved.distinct[0]:
        assert full.at(point.tokens)[0] == pytest.approx(point.measured)
    lower = curve_of(0, Rule(top_k=2))
    assert all(lower.at(n)[0] < full.at(n)[0] for n in (2, 8, 32))
    assert "measured" in full.origin
    with pytest.raises(LeanMoeError, match="traces replayed"):
        curve_of(0, Rule(guaranteed=1))


@pytest.mark.parametrize(
    ("profile", "message"),
    [
        (None, r"damaged \("),
        ({"layers": []}, "not all of 2 layers have numbers"),
        ({"layers": [{"distinct": []}] * 2}, "not all of 2 layers have numbers"),
        ({"layers": [{"distinct": 7}] * 2}, r"damaged \("),
        (
            {"layers": [{"distinct": [{"tokens": 0, "measured": 4}]}] * 2},
            "0 tokens activate 4 experts",
        ),
        ({"layers": [{"distinct": [{"tokens": 1, "measured": 17}]}] * 2}, "1 tokens activate 17"),
        ({"layers": [{"distinct": [{"tokens": 1, "measured": float("nan")}]}] * 2}, "activate nan"),
    ],
)
def test_a_damaged_profile_is_refused(profile: object, message: str) -> None:
    model = read_shape(
        {
            **CONFIGS["Qwen/Qwen3-30B-A3B"],
            "num_hidden_layers": 2,
            "num_experts": 16,
            "num_experts_per_tok": 4,
        }
    )
    with pytest.raises(LeanMoeError, match=message):
        saved_curves({"model": asdict(model.fingerprint()), "profile": profile}, model)
    with pytest.raises(LeanMoeError, match="the profile's model is 3: it must be an object"):
        saved_curves({"model": 3, "profile": profile}, model)
