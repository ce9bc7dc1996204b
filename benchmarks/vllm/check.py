"""Does the plugin hold in a vLLM that spreads, moves or quantises the experts?

    python -m benchmarks.vllm.check --settings one,tp2,tp2-ep,tp2-ep-eplb,pp2,fp8

For each setting vLLM runs a small drawn model with worker processes of its own, as a service does;
all requests come at the same time, so every run has the same steps. It runs twice without the
plugin, under an empty plan, with and without statistics, with fewer experts by vLLM's own setting
and by a plan, and under a plan that skips experts. Compared are the greedy tokens, and what each
worker says of its last step. Nothing is timed, so `--engines` of them run at the same time.

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
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.common.results import collect, file_of, parser_of, write
from benchmarks.vllm.draw_model import draw
from benchmarks.vllm.gpu_lock import GpuLock
from benchmarks.vllm.settings import SEVERAL_GPUS, prepare
from benchmarks.vllm.shapes import QWEN

MODEL = QWEN | {
    "hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2,
    "head_dim": 64, "moe_intermediate_size": 128, "intermediate_size": 256, "num_experts": 64,
    "num_experts_per_tok": 8, "vocab_size": 2048, "max_position_embeddings": 1024,
}  # fmt: skip
EPLB = {"window_size": 8, "step_interval": 16, "num_redundant_experts": 8, "use_async": False}
"""Experts are moved several times in a reply."""
TENSOR = {"tensor_parallel_size": 2}
SPREAD = TENSOR | {"enable_expert_parallel": True}
SETTINGS: dict[str, dict[str, Any]] = {
    "one": {},
    "tp2": TENSOR,
    "tp2-ep": SPREAD,
    "tp2-ep-eplb": SPREAD | {"enable_eplb": True, "eplb_config": EPLB},
    "pp2": {"pipeline_parallel_size": 2},
    "fp8": {"quantization": "fp8"},
}
STOCK, AGAIN, EMPTY, UNCOUNTED, FEWER, UNIFORM, SKIPPING = (
    "stock", "again", "empty", "uncounted", "fewer", "top_k=4", "guaranteed=3"
)  # fmt: skip
RUNS = (STOCK, AGAIN, EMPTY, UNCOUNTED, FEWER, UNIFORM, SKIPPING)
"""Uncounted is an empty plan without statistics, which leaves vLLM's routers as they are."""
PAIRS = ((AGAIN, STOCK), (EMPTY, STOCK), (UNCOUNTED, STOCK), (UNIFORM, FEWER))
"""Runs whose tokens must be the same, as far as stock vLLM repeats its own."""
CAPTURED = [1, 2, 4, 8, 16]
REPLIES, TOKENS = 16, 48
PATIENCE = 400


def parse() -> argparse.Namespace:
    """The command line."""
    parser = parser_of(__doc__)
    parser.add_argument("--settings", default=",".join(SETTINGS), help="comma separated")
    parser.add_argument("--runs", default=",".join(RUNS), help="comma separated")
    parser.add_argument("--replies", type=int, default=REPLIES, help="concurrency, at most 16")
    parser.add_argument("--engines", type=int, default=4, help="engines that run at the same time")
    parser.add_argument("--memory", type=float, default=0.05, help="share of the GPU's an engine")
    parser.add_argument("--vllm", default="installed", help="'installed', or a folder")
    parser.add_argument("--lock", type=Path, help="as in vllm.several_gpus: nobody measures beside")
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    return parser.parse_args()


def plan_of(run: str) -> Any:
    """The plan of a run; None where there is none."""
    from leanmoe.models.shape import read_shape
    from leanmoe.plan import Plan, Rule

    rules = {EMPTY: Rule(), UNCOUNTED: Rule(), UNIFORM: Rule(top_k=4), SKIPPING: Rule(guaranteed=3)}
    return Plan.uniform(read_shape(MODEL).fingerprint(), rules[run]) if run in rules else None


def engine(folder: Path) -> None:
    """One engine, in a process of its own."""
    from random import Random

    told = json.loads((folder / "told.json").read_text())
    from vllm import LLM, SamplingParams

    llm = LLM(**told["settings"])
    random = Random(0)
    prompts = [
        {"prompt_token_ids": [random.randrange(2048) for _ in range(5 + 3 * number)]}
        for number in range(told["replies"])
    ]
    wanted = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False)
    replies = llm.generate(prompts, wanted, use_tqdm=False)
    found = {
        "tokens": [list(reply.outputs[0].token_ids) for reply in replies],
        "workers": llm.collective_rpc("leanmoe_statistics"),
    }
    (folder / "found.json").write_text(json.dumps(found))
    sys.stdout.flush()
    os._exit(0)


def start(
    name: str, run: str, model: Path, folder: Path, options: argparse.Namespace
) -> dict[str, Any]:
    """Runs an engine and waits: its tokens and its workers' words, or what was wrong."""
    folder.mkdir(parents=True)
    settings: dict[str, Any] = {
        "model": str(model), "dtype": "bfloat16", "skip_tokenizer_init": True, "seed": 0,
        "max_model_len": 256, "max_num_seqs": 16, "enable_prefix_caching": False,
        "generation_config": "vllm", "gpu_memory_utilization": options.memory,
        "kv_cache_memory_bytes": 1 << 28, "moe_backend": "triton",
        "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY",
                               "cudagraph_capture_sizes": CAPTURED},
        "attention_config": {"backend": "FLASH_ATTN", "flash_attn_version": 3},
        "worker_extension_cls": "leanmoe.serve.vllm.plan_metrics.PlanWorker",
        **SETTINGS[name],
    }  # fmt: skip
    if run == FEWER:
        settings["hf_overrides"] = {"num_experts_per_tok": 4}
    environment = dict(os.environ) | {"VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
    if run != UNCOUNTED:
        environment["LEANMOE_STATISTICS"] = "1"
    if plan := plan_of(run):
        plan.save(folder / "plan.json")
        environment["LEANMOE_PLAN"] = str(folder / "plan.json")
    told = {"settings": settings, "replies": options.replies}
    (folder / "told.json").write_text(json.dumps(told))
    log = folder / "log.txt"
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.vllm.check", "--engine", str(folder)],
            env=environment,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
        try:
            code = process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            code = -1
        finally:  # vLLM's workers outlive it
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    path = folder / "found.json"
    if code or not path.exists():
        return {"trouble": what_went_wrong(log.read_text())}
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
        return {"same": None}
    parted = []
    for a, b in zip(mine["tokens"], other["tokens"], strict=True):
        parted += [
            place for place, pair in enumerate(zip(a, b, strict=True)) if len(set(pair)) > 1
        ][:1]
    return {"same": 1 - len(parted) / len(mine["tokens"]), "parted_at_token": sorted(parted)}


def rows_of(found: dict[tuple[str, str], dict[str, Any]], names: list[str]) -> list[dict[str, Any]]:
    """What must be the same, and whether it is; a plan that skips, also beside other settings."""
    rows: list[dict[str, Any]] = []
    for name in names:
        beside = [(mine, name, other) for mine, other in (*PAIRS, (SKIPPING, STOCK))]
        beside += [(SKIPPING, other, SKIPPING) for other in names if other != name]
        for mine, where, other in beside:
            if {(name, mine), (where, other)} <= found.keys():
                row = {"setting": name, "run": mine, "beside": other, "in": where}
                rows.append(row | compared(found[name, mine], found[where, other]))
    return rows


def entry_point(folder: Path) -> None:
    """Lets vLLM find the plugin where leanmoe is on the path and not installed."""
    from importlib.metadata import entry_points

    if any(point.name == "leanmoe" for point in entry_points(group="vllm.general_plugins")):
        return
    info = folder / "leanmoe-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: leanmoe\nVersion: 0\n")
    (info / "entry_points.txt").write_text(
        "[vllm.general_plugins]\nleanmoe = leanmoe.serve.vllm.plugin:activate\n"
    )
    os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])


def main() -> None:
    """Runs it."""
    options = parse()
    if options.engine:
        engine(Path(options.engine))
        return
    names, asked_runs = options.settings.split(","), options.runs.split(",")
    for option, asked, known in (("settings", names, SETTINGS), ("runs", asked_runs, RUNS)):
        if unknown := set(asked) - set(known):
            sys.exit(f"--{option} has {unknown.pop()}: it must be of {', '.join(known)}")
    if not 1 <= options.replies <= max(CAPTURED):
        sys.exit(f"--replies is {options.replies}: it must be 1 to {max(CAPTURED)}")
    lock = GpuLock(options.lock) if options.lock else None
    prepare(options.vllm, SEVERAL_GPUS)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = folder / "model"
        draw(model, MODEL)
        entry_point(folder)
        keys = [(name, run) for name in names for run in asked_runs]
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
    """All as JSON and on screen; exits with 1 where something must be the same and is not."""
    engines = [
        {"setting": name, "run": run}
        | {word: one[word] for word in ("said", "workers", "trouble") if one.get(word)}
        for (name, run), one in found.items()
    ]
    found_all = {"model": MODEL, "eplb": EPLB, "replies": options.replies}
    found_all |= {"rows": rows, "engines": engines}
    made = collect(seed=0)
    path = file_of(options.output, "vllm-check", made)
    write(path, made, "measured", {"leanmoe_benchmark": "vllm_check", **found_all})
    print(f"{'setting':14} {'run':14} {'beside':14} {'in':14} same replies")
    for row in rows:
        share = "-" if row["same"] is None else f"{row['same']:.0%} {row['parted_at_token']}"
        print(f"{row['setting']:14} {row['run']:14} {row['beside']:14} {row['in']:14} {share}")
    for (name, run), one in found.items():
        if run == SKIPPING and "said" in one:
            print(f"{name}: {one['said']}")
            for rank, worker in enumerate(one["workers"]):
                counts = [f"{e['distinct']} {e['activated']:.1f}" for e in worker["layers"] if e]
                print(f"  worker {rank}, distinct experts and experts a token, by layer: {counts}")
    print(path)
    if any(row["same"] != 1 for row in rows if (row["run"], row["beside"]) in PAIRS):
        sys.exit("something that must be the same is not, or is missing")


if __name__ == "__main__":
    main()
