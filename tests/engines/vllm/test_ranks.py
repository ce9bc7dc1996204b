"""vLLM on two ranks of a CPU: tensor parallelism as it is, expert, data and pipeline parallelism
with what vLLM lacks there in plain torch (`cpu_ranks`).
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from leanmoe.models.shape import read_shape
from leanmoe.plan import Band, Level, Plan, Rule
from leanmoe.plan.placement import Placement
from tests.engines.vllm.conftest import SETTINGS
from tests.engines.vllm.switching import CHANGE_AT

MODEL = read_shape("reference").fingerprint()
HERE = Path(__file__).parent
TENSOR = {"tensor_parallel_size": 2}
STAGES = {"pipeline_parallel_size": 2}
DATA = {"data_parallel_size": 2, "enable_expert_parallel": True}
SEVERAL = Plan.per_layer(
    MODEL,
    (Rule(guaranteed=1), Rule(budget_per_rank=6), Rule(budget=20), Rule(top_k=6),
     Rule(guaranteed=2, threshold=0.2), Rule()),
)  # fmt: skip
OWN = Plan.per_layer(
    MODEL,
    (Rule(top_k=5), Rule(threshold=0.2), Rule(top_p=0.8), Rule(top_k=6), Rule(top_k=6), Rule()),
)
"""Rules under which it does not matter which requests share a step."""
PROMPTS = [[5, 6, 7, 8 + number, 30 * number + 9] for number in range(4)]
PATIENCE = 300


def run(
    folder: Path,
    layout: dict[str, Any],
    requests: list[Any],
    plan: Plan | None = None,
    cross_rank: bool = False,
    then_stock: bool = False,
) -> list[dict[str, Any]]:
    """What two processes ran and replied, each with its own requests."""
    folder.mkdir()
    for left in Path("/dev/shm").glob("-*:*-cpushm_*"):  # vLLM trips over a killed engine's
        left.unlink()
    if plan is not None:
        plan.save(folder / "plan.json")
    settings = {
        "plan": plan is not None, "cross_rank": cross_rank, "layout": layout, "requests": requests,
        "then_stock": then_stock,
    }  # fmt: skip
    (folder / "settings.json").write_text(json.dumps(settings))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ, **SETTINGS, "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "PYTHONPATH": os.pathsep.join([str(HERE / "cpu_ranks"), *sys.path]),
    }  # fmt: skip
    logs = [folder / f"{rank}.txt" for rank in range(2)]
    processes = []
    for rank, log in enumerate(logs):
        mine = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        with log.open("w") as out:
            processes.append(
                subprocess.Popen(
                    [sys.executable, HERE / "rank.py", folder], env=mine, stdout=out, stderr=out
                )
            )
    try:
        for process, log in zip(processes, logs, strict=True):
            assert process.wait(timeout=PATIENCE) == 0, log.read_text()[-3000:]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def all_of(count: int) -> list[list[Any]]:
    """All prompts for both ranks, as tensor parallelism has it."""
    return [[(prompt, count) for prompt in PROMPTS]] * 2


@pytest.fixture(scope="module")
def tensor_parallel(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Two tensor-parallel ranks under a plan with other rules in each layer."""
    return run(tmp_path_factory.mktemp("tensor") / "planned", TENSOR, all_of(16), SEVERAL)


def test_tensor_parallel_ranks_agree_and_an_empty_plan_changes_nothing(
    tmp_path: Path, tensor_parallel: list[dict[str, Any]]
) -> None:
    stock = run(tmp_path / "stock", TENSOR, all_of(16))
    empty = run(tmp_path / "empty", TENSOR, all_of(16), Plan(MODEL))
    assert stock[0]["tokens"] == stock[1]["tokens"] == empty[0]["tokens"] == empty[1]["tokens"]
    planned = tensor_parallel
    assert planned[0] == planned[1]  # every id of every step and layer too
    assert len(planned[0]["steps"]) == 16 * MODEL.moe_layers
    assert planned[0]["tokens"] != stock[0]["tokens"]  # else the plan did nothing


def active_experts(step: Any, slots: slice = slice(None)) -> set[int]:
    """The experts of a step's tokens, or those of some of their slots."""
    _, ids, used = step
    return {
        expert
        for row, is_used in zip(ids, used, strict=True)
        for expert, one in zip(row[slots], is_used[slots], strict=True)
        if one
    }


def experts_of(steps: list[Any], layer: int) -> list[list[set[int]]]:
    """The experts that each row of each step of a layer used."""
    return [
        [
            {expert for expert, one in zip(row, is_used, strict=True) if one}
            for row, is_used in zip(ids, used, strict=True)
        ]
        for number, ids, used in steps
        if number == layer
    ]


def test_each_pipeline_stage_runs_its_own_layers_of_the_plan(
    tmp_path: Path, tensor_parallel: list[dict[str, Any]]
) -> None:
    """The second stage counts on where the first ends: it routes as ranks that have all layers."""
    empty = run(tmp_path / "empty", STAGES, all_of(16), Plan(MODEL))
    planned = run(tmp_path / "planned", STAGES, all_of(16), SEVERAL, then_stock=True)
    stock = planned[0]["stock"]
    assert stock == planned[1]["stock"] == empty[0]["tokens"] == empty[1]["tokens"]
    layers = [sorted({layer for layer, *_ in stage["steps"]}) for stage in planned]
    assert layers[0] + layers[1] == list(range(MODEL.moe_layers))
    assert all(layers), "a stage has no layer"
    for stage, own in zip(planned, layers, strict=True):
        for layer in own:
            experts = experts_of(stage["steps"], layer)
            assert len(experts) == 16
            assert experts == experts_of(tensor_parallel[0]["steps"], layer)
        assert stage["tokens"] == tensor_parallel[0]["tokens"] != stock


@pytest.mark.parametrize("cross_rank", [True, False], ids=["all", "rank"])
def test_uneven_data_parallel_ranks_end_and_share_their_experts(
    tmp_path: Path, cross_rank: bool
) -> None:
    """One rank has more requests, and goes on long after the other has none."""
    requests = [[(PROMPTS[0], 3)], [(PROMPTS[1], 12), (PROMPTS[2], 9), (PROMPTS[3], 12)]]
    ranks = run(tmp_path / "found", DATA, requests, SEVERAL, cross_rank)
    assert [len(tokens) for tokens in ranks[1]["tokens"]] == [12, 9, 12]
    steps = [one["steps"] for one in ranks]
    assert len(steps[0]) == len(steps[1])  # a rank without requests takes part
    placement = Placement.linear(MODEL.experts, 2)
    borrowed = 0
    for mine, other in zip(*steps, strict=True):
        layer = mine[0]
        assert other[0] == layer
        sides = (mine, other)
        bests = [active_experts(step, slice(0, 1)) for step in sides]
        every = bests[0] | bests[1]
        if layer == 0:  # guaranteed=1: only experts that are some token's best are active
            for step, own in zip(sides, bests, strict=True):
                assert active_experts(step) <= (every if cross_rank else own)
                borrowed += len(active_experts(step) - own)
        if layer == 1:
            groups = (
                [active_experts(mine) | active_experts(other)]
                if cross_rank
                else [active_experts(s) for s in sides]
            )
            limits = [every] if cross_rank else bests
            for active, best in zip(groups, limits, strict=True):
                for rank in range(2):
                    held = set(placement.experts_on(rank))
                    assert len(active & held) <= max(6, len(best & held))
    assert (borrowed > 0) == cross_rank


def install_plugins(folder: Path) -> Path:
    """A folder from which vLLM finds leanmoe's entry points, as where it is installed."""
    installed = folder / "installed" / "leanmoe-0.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: leanmoe\nVersion: 0\n")
    (installed / "entry_points.txt").write_text(
        "[vllm.general_plugins]\nleanmoe = leanmoe.serve.vllm.plugin:activate\n"
        "leanmoe_control = leanmoe.serve.vllm.plugin:control\n"
    )
    return installed.parent


def test_the_plan_reaches_the_workers_that_vllm_starts(tmp_path: Path) -> None:
    """By its entry point, as in a service, with the tokens that `run` finds.

    A request may reach them a step later than the others, so the rules are a token's own.
    """
    installed = install_plugins(tmp_path)
    OWN.save(tmp_path / "plan.json")
    (tmp_path / "prompts.json").write_text(json.dumps(PROMPTS))
    environment = {
        **os.environ, **SETTINGS, "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "LEANMOE_STATISTICS": "1",
        "LEANMOE_PLAN": str(tmp_path / "plan.json"),
        "PYTHONPATH": os.pathsep.join([str(installed), *sys.path]),
    }  # fmt: skip
    log = tmp_path / "log.txt"
    with log.open("w") as out:
        command = [sys.executable, str(HERE / "workers.py"), str(tmp_path)]
        done = subprocess.run(
            command, env=environment, stdout=out, stderr=out, timeout=PATIENCE, check=False
        )
    assert done.returncode == 0, log.read_text()[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found["workers"]) == 2
    assert found["workers"][0] == found["workers"][1]
    assert found["workers"][0]["layers"][3]["activated"] == 6
    planned = run(tmp_path / "planned", TENSOR, all_of(16), OWN)
    assert planned[0]["tokens"] == found["tokens"]


def test_all_ranks_change_the_plan_at_the_same_step(tmp_path: Path) -> None:
    """Requests of three tiers run on through the change, with the tokens that one rank finds."""
    for name, most in (("a", 6), ("b", 3)):
        levels = (("careful", most), ("fast", most - 1))
        Plan(
            MODEL,
            tuple(Level(one, (Band(None, (Rule(top_k=k),) * 6),)) for one, k in levels),
        ).save(tmp_path / f"{name}.json")
    (tmp_path / "prompts.json").write_text(json.dumps(PROMPTS))
    environment = {
        **os.environ, **SETTINGS, "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "LEANMOE_PLAN": f"{tmp_path / 'a.json'},{tmp_path / 'b.json'}", "LEANMOE_CHECK_ROWS": "1",
        "PYTHONPATH": os.pathsep.join([str(install_plugins(tmp_path)), *sys.path]),
    }  # fmt: skip
    found = []
    for ranks in (1, 2):
        command = [sys.executable, str(HERE / "switching.py"), str(tmp_path), str(ranks)]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(json.loads((tmp_path / f"{ranks}.json").read_text()))
    one, both = found
    plans = [step[0][0] for step in both["steps"]]
    assert plans == [0] * CHANGE_AT + [1] * (len(plans) - CHANGE_AT)
    assert len(plans) > CHANGE_AT + 4
    assert all(step == [step[0]] * 3 for step in both["steps"]), "every rank heard the same"
    assert both["tokens"] == one["tokens"]
    assert len(one["tokens"]) == len(PROMPTS)
