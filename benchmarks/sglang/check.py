"""Whether an engine under a plan answers as it must: what is run, and what is compared.

Eight engines on one small drawn model, at once. A plan that changes nothing must give stock's
tokens; a uniform `top_k` those of a model that has so few; experts that a plan leaves out may hold
anything. What stock itself does not say twice is noise, and is allowed to all.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.sglang.settings import CHECKED, engine_settings
from benchmarks.vllm.draw_model import draw
from leanmoe.core.environment import PLAN
from leanmoe.models.shape import read_shape
from leanmoe.plan import Band, Plan, Rule

LOADS = (1, 5, 8, 9)
"""Requests: of the captured sizes 1, 2, 4, 8 and 16 steps of 5 and 9 are padded."""
SIZES = [1, 2, 4, 8, 16]
TURNS, REPLY, FEWER = 2, 24, 4
NAN = "nan"


@dataclass(frozen=True)
class Checked:
    """One engine: its plan, and what else differs from stock."""

    name: str
    plan: Plan | None = None
    settings: tuple[tuple[str, Any], ...] = ()
    is_damaged: bool = False
    """Whether experts that `experts` leaves out hold NaN."""


def engines(model: Path) -> list[Checked]:
    """All that are compared."""
    shape = read_shape(str(model)).fingerprint()
    half = Plan.uniform(shape, Rule(experts=tuple(range(0, shape.experts, 2))))
    few, many = ((Rule(guaranteed=k),) * shape.moe_layers for k in (1, 2))
    sharing = Plan.banded(shape, (Band(6, few), Band(None, many)))
    override = json.dumps({"num_experts_per_tok": FEWER})
    return [
        Checked("stock"),
        Checked("empty plan", Plan.uniform(shape, Rule())),
        Checked("top_k", Plan.uniform(shape, Rule(top_k=FEWER))),
        Checked("override", None, (("json_model_override_args", override),)),
        Checked("half the experts", half),
        Checked("half the experts, NaN in the others", half, is_damaged=True),
        Checked("sharing", sharing),
        Checked("sharing, not captured", sharing, (("disable_cuda_graph", True),)),
    ]


PAIRS = (
    ("empty plan", "stock"),
    ("top_k", "override"),
    ("half the experts, NaN in the others", "half the experts"),
)
"""Those that must answer alike."""
SHOWN = (("sharing", "sharing, not captured"), ("top_k", "stock"))
"""Those that are shown: requests that share experts answer by who was there when, and a plan must
change something."""


def draw_models(folder: Path) -> dict[bool, Path]:
    """The drawn model, and a copy with NaN in every other expert."""
    import shutil

    from safetensors.torch import load_file, save_file

    model, damaged = folder / "model", folder / NAN
    if not model.exists():
        draw(model, CHECKED)
        shutil.copytree(model, damaged)
        for path in damaged.glob("*.safetensors"):
            weights = load_file(path)
            save_file(with_nan(weights), path, metadata={"format": "pt"})
    return {False: model, True: damaged}


def with_nan(weights: dict[str, Any]) -> dict[str, Any]:
    """The weights with NaN in all experts of odd number; KeyError where none has a number."""
    found = {}
    for name, weight in weights.items():
        number = name.partition(".experts.")[2].partition(".")[0]
        is_left_out = number.isdigit() and int(number) % 2 == 1
        found[name] = weight * float("nan") if is_left_out else weight
    if not any(".experts.1." in name for name in weights):
        raise KeyError("the checkpoint names no expert by its number")
    return found


def request(checked: Checked, models: dict[bool, Path], place: int) -> dict[str, Any]:
    """What one engine's process is asked."""
    settings = engine_settings(
        models[checked.is_damaged], place, cuda_graph_bs_decode=SIZES, max_running_requests=16,
        max_total_tokens=8192, context_length=1024, mem_fraction_static=0.9,
    )  # fmt: skip
    return {
        "do": "tokens", "settings": settings | dict(checked.settings), "loads": LOADS,
        "turns": TURNS, "reply": REPLY, "vocabulary": CHECKED["vocab_size"],
    }  # fmt: skip


def environment(checked: Checked, folder: Path) -> dict[str, str]:
    """The variable that puts an engine's plan to work."""
    if checked.plan is None:
        return {}
    path = folder / f"{checked.name}.json"
    checked.plan.save(path)
    return {PLAN: str(path)}


def verdicts(answers: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """For each pair and load the share of equal replies, beside stock's with itself."""
    found = []
    for pairs, must in ((PAIRS, True), (SHOWN, False)):
        for ours, others in pairs:
            for load in map(str, LOADS):
                replies = [answers.get(each, {}).get("tokens", {}) for each in (ours, others)]
                if any(load not in each for each in replies):
                    found.append({"pair": [ours, others], "requests": int(load), "ran": False})
                    continue
                a, b = (each[load] for each in replies)
                noise = equal_share(b[0], b[1])
                equal = max(equal_share(x, y) for x in a for y in b)
                found.append(
                    {
                        "pair": [ours, others], "requests": int(load), "ran": True,
                        "equal": equal, "same_engine_twice": noise,
                        "holds": equal >= noise if must else None,
                    }
                )  # fmt: skip
    return found


def equal_share(ours: list[list[int]], others: list[list[int]]) -> float:
    """The share of replies that are equal, token for token."""
    return sum(a == b for a, b in zip(ours, others, strict=True)) / len(ours)
