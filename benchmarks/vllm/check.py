"""Does the plugin hold in a vLLM that pads, spreads, moves or quantises?

    python -m benchmarks.vllm.check --settings padding --replies 1,5,16,33
    python -m benchmarks.vllm.check --settings one,tp2,tp2-ep,tp2-ep-eplb,pp2,fp8

For each setting vLLM runs a small model in processes of its own, as a service does; all requests
come at the same time, so every run has the same steps. Compared are the greedy tokens, and what
each worker says of its last step. Nothing is timed, so `--engines` of them run at the same time.

- One GPU with either model runner, several with tensor, expert and pipeline parallelism, fp8: vLLM
  without the plugin, twice, under an empty plan, with and without statistics, with fewer experts by
  vLLM's own setting and by a plan, and under plans that skip experts. `--replies` are
  concurrencies: 5 and 33 are padded to captured sizes.
- `exact` and `padded`: steps of 5 rows as they are, and padded to 8, both batch-invariant
  (VLLM_BATCH_INVARIANT), so that the same rows give the same bits. One run has padding vote: it
  must give other tokens, or the comparison says nothing.
- Under plans that skip, every layer is also run on its own with up to 4,096 rows, NaN in the
  weights of each expert that no row uses and in the workspace: no bit may change.

With `tp2-ep-eplb` vLLM moves its experts while the replies are made, and copies some, by how often
each was chosen. It counts padding rows, too, in which stands what was in memory before: 16 replies,
a captured size, are steps without padding; with `--replies 12` there is some.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common.results import collect, file_of, parser_of, write
from benchmarks.vllm import check_engine
from benchmarks.vllm.draw_model import draw
from benchmarks.vllm.gpu_lock import GpuLock
from benchmarks.vllm.settings import SEVERAL_GPUS, has_gpu, let_plugin_be_found, prepare
from benchmarks.vllm.shapes import FP8, QWEN

MODEL = QWEN | {
    "hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2,
    "head_dim": 64, "moe_intermediate_size": 128, "intermediate_size": 256, "num_experts": 64,
    "num_experts_per_tok": 8, "vocab_size": 2048, "max_position_embeddings": 1024,
}  # fmt: skip
EPLB = {"window_size": 8, "step_interval": 16, "num_redundant_experts": 8, "use_async": False}
"""Experts are moved several times in a reply."""
TENSOR = {"tensor_parallel_size": 2}
SPREAD = TENSOR | {"enable_expert_parallel": True}
STOCK, AGAIN, EMPTY, UNCOUNTED, FEWER, UNIFORM, SKIPPING, ONE_KEPT, MIXED, BLIND = (
    "stock", "again", "empty", "uncounted", "fewer", "top_k=4", "guaranteed=3", "guaranteed=1",
    "mixed", "blind",
)  # fmt: skip
RUNS = (STOCK, AGAIN, EMPTY, UNCOUNTED, FEWER, UNIFORM, SKIPPING)
"""Uncounted is an empty plan without statistics, which leaves vLLM's routers as they are; mixed has
another rule in each layer; blind is guaranteed=1 where padding votes."""
PAIRS = ((AGAIN, STOCK), (EMPTY, STOCK), (UNCOUNTED, STOCK), (UNIFORM, FEWER))
"""Runs whose tokens must be the same, as far as stock vLLM repeats its own."""
CAPTURED = (1, 2, 4, 8, 16, 32, 64)
PADDED, EXACT = (8,), tuple(range(1, 9))
REPLIES, TOKENS = "16", 48
PATIENCE = 400
V1, V2 = {"VLLM_USE_V2_MODEL_RUNNER": "0"}, {"VLLM_USE_V2_MODEL_RUNNER": "1"}
NUMBERS = ("rows", "experts_unused", "slots_skipped", "apart")
"""What is said of steps with NaN in skipped experts."""
INVARIANT = {"VLLM_BATCH_INVARIANT": "1"}


@dataclass(frozen=True)
class Setting:
    """What a setting has that others have not."""

    engine: dict[str, Any] = field(default_factory=dict)
    """Settings of vLLM."""
    environment: dict[str, str] = field(default_factory=dict)
    runs: tuple[str, ...] = RUNS
    captured: tuple[int, ...] = CAPTURED
    replies: str = ""
    """Concurrencies, in place of those of the command line."""
    batches: int = 1
    """How many times so many requests are made, each time others."""
    model: dict[str, Any] = field(default_factory=dict)
    """Of the model's config; such a model has dummy weights."""


def batch_of_five(environment: dict[str, str], captured: tuple[int, ...], *runs: str) -> Setting:
    """Steps of 5 rows, in graphs of these sizes."""
    return Setting({}, environment | INVARIANT, runs, captured, "5", batches=6)


BLOCKS = FP8 | {"modules_to_not_convert": [f"model.layers.{layer}.mlp.gate" for layer in range(4)]}
"""Blocks of fp8 in all but the routers, as Qwen publishes them."""
SETTINGS: dict[str, Setting] = {
    "one": Setting(),
    "v1": Setting(environment=V1, runs=(STOCK, AGAIN, EMPTY, SKIPPING, MIXED)),
    "v2": Setting(environment=V2, runs=(STOCK, EMPTY, SKIPPING, MIXED)),
    "v1-exact": batch_of_five(V1, EXACT, STOCK, SKIPPING, ONE_KEPT),
    "v1-padded": batch_of_five(V1, PADDED, STOCK, SKIPPING, ONE_KEPT, BLIND),
    "v2-exact": batch_of_five(V2, EXACT, SKIPPING, ONE_KEPT),
    "v2-padded": batch_of_five(V2, PADDED, SKIPPING, ONE_KEPT, BLIND),
    "fp8-blocks": Setting(environment=V1, runs=(MIXED,), model={"quantization_config": BLOCKS}),
    "tp2": Setting(TENSOR),
    "tp2-ep": Setting(SPREAD),
    "tp2-ep-eplb": Setting(SPREAD | {"enable_eplb": True, "eplb_config": EPLB}),
    "pp2": Setting({"pipeline_parallel_size": 2}),
    "fp8": Setting({"quantization": "fp8"}),
}
PADDING = "padding"
"""All settings of one GPU that tell how padding is treated, and what skipped slots cost."""
GROUPS = {
    PADDING: ("v1", "v2", "v1-exact", "v1-padded", "v2-exact", "v2-padded", "fp8-blocks"),
}
SAME = tuple(
    (runner + "-padded", run, runner + "-exact", run)
    for runner in ("v1", "v2")
    for run in (STOCK, SKIPPING, ONE_KEPT)
)
"""Runs of two settings whose tokens must be the same."""
OTHER = tuple((runner + "-padded", BLIND, runner + "-exact", ONE_KEPT) for runner in ("v1", "v2"))
"""Runs of two settings whose tokens must not be the same."""


def parse() -> argparse.Namespace:
    """The command line."""
    parser = parser_of(__doc__)
    parser.add_argument("--settings", default="one,tp2,tp2-ep,tp2-ep-eplb,pp2,fp8", help="of "
                        + ", ".join(SETTINGS))  # fmt: skip
    parser.add_argument("--runs", help="comma separated; each setting's own where not given")
    parser.add_argument("--replies", default=REPLIES, help="concurrencies, comma separated")
    parser.add_argument("--engines", type=int, default=4, help="engines that run at the same time")
    parser.add_argument("--memory", type=float, default=0.05, help="share of the GPU's an engine")
    parser.add_argument("--patience", type=float, default=PATIENCE, help="seconds an engine")
    parser.add_argument("--vllm", default="installed", help="'installed', or a folder")
    parser.add_argument("--lock", type=Path, help="as in vllm.several_gpus: nobody measures beside")
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    return parser.parse_args()


def plan_of(run: str) -> Any:
    """The plan of a run; None where there is none."""
    from leanmoe.models.shape import read_shape
    from leanmoe.plan import Band, Plan, Rule

    model = read_shape(MODEL).fingerprint()
    skipping = Rule(guaranteed=3)
    rules = {EMPTY: Rule(), UNCOUNTED: Rule(), UNIFORM: Rule(top_k=4)}
    rules |= {SKIPPING: skipping, ONE_KEPT: Rule(guaranteed=1), BLIND: Rule(guaranteed=1)}
    if run == MIXED:
        layers = (Rule(budget=24), skipping, Rule(threshold=0.5), Rule(top_k=6, top_p=0.7))
        return Plan.banded(model, (Band(None, layers),))
    return Plan.uniform(model, rules[run]) if run in rules else None


def engine_settings(
    setting: Setting, run: str, model: Path, options: argparse.Namespace
) -> dict[str, Any]:
    """What vLLM is told."""
    settings: dict[str, Any] = {
        "model": str(model), "dtype": "bfloat16", "skip_tokenizer_init": True, "seed": 0,
        "max_model_len": 256, "max_num_seqs": 64, "max_num_batched_tokens": 4096,
        "enable_prefix_caching": False, "generation_config": "vllm",
        "gpu_memory_utilization": options.memory, "kv_cache_memory_bytes": 1 << 28,
        "worker_extension_cls": "leanmoe.serve.vllm.plan_metrics.PlanWorker",
    }  # fmt: skip
    if has_gpu():
        settings |= {
            "moe_backend": "triton",
            "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY",
                                   "cudagraph_capture_sizes": list(setting.captured)},
            "attention_config": {"backend": "FLASH_ATTN", "flash_attn_version": 3},
        }  # fmt: skip
    else:
        settings["enforce_eager"] = True
    if run == FEWER:
        settings["hf_overrides"] = {"num_experts_per_tok": 4}
    if setting.model:
        settings["load_format"] = "dummy"
    return settings | setting.engine


def told_of(setting: Setting, run: str, model: Path, options: argparse.Namespace) -> dict[str, Any]:
    """What an engine's process is told: vLLM's settings, and what it is to do."""
    gpus = int(setting.engine.get("tensor_parallel_size", 1))
    gpus *= int(setting.engine.get("pipeline_parallel_size", 1))
    return {
        "settings": engine_settings(setting, run, model, options),
        "replies": [int(part) for part in (setting.replies or options.replies).split(",")],
        "tokens": TOKENS,
        "batches": setting.batches,
        "is_blind": run == BLIND,
        "tries_nan": run in (SKIPPING, MIXED) and gpus == 1,
        "rows": list(check_engine.ROWS),
    }


def start(
    name: str, run: str, model: Path, folder: Path, options: argparse.Namespace
) -> dict[str, Any]:
    """Runs an engine and waits: its tokens and its workers' words, or what was wrong."""
    folder.mkdir(parents=True)
    setting = SETTINGS[name]
    if setting.model:
        model = folder / "model"
        model.mkdir()
        (model / "config.json").write_text(json.dumps(MODEL | setting.model))
    environment = dict(os.environ) | {"VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
    environment |= setting.environment if has_gpu() else {}
    if run != UNCOUNTED:
        environment["LEANMOE_STATISTICS"] = "1"
    if plan := plan_of(run):
        plan.save(folder / "plan.json")
        environment["LEANMOE_PLAN"] = str(folder / "plan.json")
    told = told_of(setting, run, model, options)
    (folder / "told.json").write_text(json.dumps(told))
    log, started = folder / "log.txt", time.monotonic()
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.vllm.check", "--engine", str(folder)],
            env=environment,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
        try:
            code = process.wait(options.patience)
        except subprocess.TimeoutExpired:
            code = -1
        finally:  # vLLM's workers outlive it
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    path = folder / "found.json"
    took = f"{time.monotonic() - started:.0f} s"
    if code or not path.exists():
        print(f"{name}, {run}: failed after {took}", flush=True)
        return {"trouble": what_went_wrong(log.read_text()), "log": log.read_text()[-6000:]}
    print(f"{name}, {run}: done after {took}", flush=True)
    said = [line for line in log.read_text().splitlines() if "leanmoe: plan" in line]
    how = said[-1].partition(" at work, ")[2] if said else ""
    return {**json.loads(path.read_text()), "said": how}


def what_went_wrong(log: str) -> str:
    """The lines of a log that name an error, each once."""
    lines = [line.partition(") ")[2] or line for line in log.splitlines() if "Error" in line]
    return "\n".join(dict.fromkeys(lines))[-2000:] or log[-1000:]


def compared(mine: dict[str, Any] | None, other: dict[str, Any] | None) -> dict[str, Any]:
    """The share of replies that are the same, and where the others part; None where one lacks."""
    if mine is None or other is None or "trouble" in mine or "trouble" in other:
        return {"same": None, "parted_at_token": []}
    parted, replies = [], 0
    for count, batches in mine["tokens"].items():
        for ours, theirs in zip(batches, other["tokens"].get(count, []), strict=True):
            for a, b in zip(ours, theirs, strict=True):
                replies += 1
                parted += [
                    place for place, pair in enumerate(zip(a, b, strict=True)) if len(set(pair)) > 1
                ][:1]
    return {"same": 1 - len(parted) / replies, "parted_at_token": sorted(parted)}


def rows_of(found: dict[tuple[str, str], dict[str, Any]], names: list[str]) -> list[dict[str, Any]]:
    """What must be the same or must not, and whether it is; of a plan that skips, also the rest."""
    beside: list[tuple[str, str, str, str, bool | None]] = [
        (name, mine, name, other, True) for name in names for mine, other in PAIRS
    ]
    beside += [(*pair, True) for pair in SAME] + [(*pair, False) for pair in OTHER]
    beside += [(name, SKIPPING, name, STOCK, None) for name in names]
    beside += [(name, SKIPPING, other, SKIPPING, None) for name in names for other in names]
    rows, seen = [], set()
    for name, mine, where, other, must in beside:
        key = ((name, mine), (where, other))
        if key in seen or key[0] == key[1] or not set(key) <= found.keys():
            continue
        if must is None and SETTINGS[name].replies != SETTINGS[where].replies:
            continue
        seen.add(key)
        row = {"setting": name, "run": mine, "beside": other, "in": where, "must_be_same": must}
        rows.append(row | compared(found[name, mine], found[where, other]))
    return rows


def wrongs(rows: list[dict[str, Any]], found: dict[tuple[str, str], dict[str, Any]]) -> list[str]:
    """What is not as it must be, a line each."""
    said = []
    for row in rows:
        must, same = row["must_be_same"], row["same"]
        words = f"{row['setting']}, {row['run']} beside {row['in']}, {row['beside']}"
        if must is not None and same is None:
            said.append(f"{words}: missing")
        elif must is not None and (same == 1) != must:
            said.append(f"{words}: {same:.0%} of the replies are the same")
    for (name, run), one in found.items():
        if "trouble" in one:
            said.append(f"{name}, {run}: did not run")
        said += [
            f"{name}, {run}: NaN in skipped experts changes a step: {step}"
            for step in one.get("nan", [])
            if not (step["is_same"] and step["is_finite"])
        ][:4]
        if one.get("nan") and has_gpu() and not any(s["slots_skipped"] for s in one["nan"]):
            said.append(f"{name}, {run}: no slot was skipped: {one['said']}")
    return said


def main() -> None:
    """Runs it."""
    options = parse()
    if options.engine:
        check_engine.run(Path(options.engine))
        return
    asked = options.settings.split(",")
    names = [name for word in asked for name in GROUPS.get(word, (word,))]
    if unknown := set(names) - set(SETTINGS):
        sys.exit(f"--settings has {unknown.pop()}: it must be of {', '.join(SETTINGS)}")
    asked_runs = options.runs.split(",") if options.runs else None
    known = {run for setting in SETTINGS.values() for run in setting.runs}
    if unknown := set(asked_runs or []) - known:
        sys.exit(f"--runs has {unknown.pop()}: it must be of {', '.join(sorted(known))}")
    lock = GpuLock(options.lock) if options.lock else None
    prepare(options.vllm, SEVERAL_GPUS)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = folder / "model"
        draw(model, MODEL)
        let_plugin_be_found(folder)
        keys = [(name, run) for name in names for run in asked_runs or SETTINGS[name].runs]
        with ThreadPoolExecutor(options.engines) as pool:
            runs = {
                key: pool.submit(start, *key, model, folder / "-".join(key), options)
                for key in keys
            }
            found = {key: run.result() for key, run in runs.items()}
    del lock
    for (name, run), one in found.items():
        if "trouble" in one:
            print(f"{name}, {run}: {one['trouble']}\n")
    report(options, rows_of(found, names), found)


def report(
    options: argparse.Namespace,
    rows: list[dict[str, Any]],
    found: dict[tuple[str, str], dict[str, Any]],
) -> None:
    """All as JSON and on screen; exits with 1 where something is not as it must be."""
    engines = [
        {"setting": name, "run": run}
        | {
            word: one[word]
            for word in ("said", "workers", "trouble", "log", "nan")
            if one.get(word)
        }
        for (name, run), one in found.items()
    ]
    found_all = {"model": MODEL, "eplb": EPLB, "replies": options.replies}
    found_all |= {"rows": rows, "engines": engines}
    made = collect(seed=0)
    path = file_of(options.output, "vllm-check", made)
    write(path, made, "measured", {"leanmoe_benchmark": "vllm_check", **found_all})
    for (name, run), one in found.items():
        if run in (SKIPPING, MIXED) and "said" in one:
            print(f"{name}, {run}: {one['said']}")
            for rank, worker in enumerate(one["workers"]):
                counts = [f"{e['distinct']} {e['activated']:.1f}" for e in worker["layers"] if e]
                print(f"  worker {rank}, distinct experts and experts a token, by layer: {counts}")
        if steps := one.get("nan", []):
            same = sum(step["is_same"] and step["is_finite"] for step in steps)
            most = {word: max(step[word] for step in steps) for word in NUMBERS}
            print(
                f"{name}, {run}: NaN changes nothing in {same} of {len(steps)} steps; most {most}"
            )
    print(*(f"{word:14}" for word in ("setting", "run", "beside", "in")), "must  same replies")
    for row in rows:
        share = "-" if row["same"] is None else f"{row['same']:.0%} {row['parted_at_token'][:9]}"
        must = {True: "same", False: "not", None: "-"}[row["must_be_same"]]
        names = (row[word] for word in ("setting", "run", "beside", "in"))
        print(*(f"{name:14}" for name in names), f"{must:5}", share)
    print(path)
    if said := wrongs(rows, found):
        sys.exit("not as it must be:\n" + "\n".join(said))


if __name__ == "__main__":
    main()
