"""How much faster does vLLM decode under a plan on several GPUs, beside one of them?

    python -m benchmarks.vllm.several_gpus --layouts 1,tp2-ep,dp2-ep,tp2 --layers 16 --seconds 540

For each layout (tensor, expert and data parallelism) one process a GPU loads the model with dummy
weights, captures the decode steps of every plan and measures them one after the other, as `one_gpu`
does on one GPU; the processes keep in step. Beside each time stand the distinct experts of a layer,
on all GPUs and on the most loaded one. What was measured is written after every load; a layout that
fails or takes too long leaves the others theirs. SIGINT or SIGTERM stops it and shows what there
is.

    python -m benchmarks.vllm.several_gpus --layouts 1 --seconds 300  # one GPU first
    python -m benchmarks.vllm.several_gpus --layouts tp2-ep,dp2-ep,tp2 --beside results/FIRST.json
    python -m benchmarks.vllm.several_gpus --show results/FIRST.json results/SECOND.json
    python -m benchmarks.vllm.several_gpus --lock /tmp/lock --seconds 60 --memory 0.2

`--beside` shows the layouts of another run in the tables, `--show` prints those of several runs and
measures nothing. Both want runs of the same hardware, versions and settings. With `--lock` all
layouts are loaded at the same time, also those of other runs with the same file, and measured one
after the other: the weights of all must fit.

A load is that of all GPUs. With data parallelism they share it evenly, so a load below their
number is left out. Each process has a scheduler of its own, so whole engine steps lack the way from
vLLM's scheduler process to its workers; the model's captured step alone does not depend on that.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

LAYOUTS = "1,tp2-ep,dp2-ep,tp2"
LOADS = "1,4,16,32,64,128,256,512"
PLANS = (
    "k=6: top_k=6; k=4: top_k=4; guaranteed=3: guaranteed=3; "
    "guaranteed=3 of all: guaranteed=3 batch_scope=all; budget: budget=3/8; "
    "budget a rank: budget_per_rank=3/16"
)
PLANS_OF_TOP_4 = (
    "k=3: top_k=3; k=2: top_k=2; guaranteed=2: guaranteed=2; "
    "guaranteed=2 of all: guaranteed=2 batch_scope=all; budget: budget=3/8; "
    "budget a rank: budget_per_rank=3/16"
)
"""A budget a rank that comes to the budget, on two ranks."""
GRACE = 30
"""Seconds that a layout may take beyond its own to write and to end."""
PATIENCE = 1800
"""Seconds that a layout may take with `--lock`, waiting for others included."""


def parse() -> argparse.Namespace:
    """The command line."""
    from benchmarks.vllm.settings import vllm_parser

    parser = vllm_parser(__doc__, "", routings="skewed")
    parser.add_argument("--layouts", default=LAYOUTS, help="1, tp2, tp2-ep, dp2-ep, ...")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile")
    parser.add_argument(
        "--no-custom-all-reduce", action="store_true", help="NCCL's all-reduce, not vLLM's own"
    )
    parser.add_argument(
        "--beside", type=Path, nargs="+", default=[], help="results of other layouts, to show"
    )
    parser.add_argument(
        "--show", type=Path, nargs="+", default=[], help="results to show; nothing is measured"
    )
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--layout", help=argparse.SUPPRESS)
    parser.set_defaults(loads=LOADS, steps=8, rounds=3, seconds=540, small_steps="auto")
    options = parser.parse_args()
    options.plans = options.plans or (PLANS_OF_TOP_4 if options.shape == "gpt-oss-120b" else PLANS)
    return options


def rank_run(options: argparse.Namespace) -> None:
    """One process of a layout: the first writes what all measured."""
    from benchmarks.common.results import collect, write
    from benchmarks.vllm.layout import Layout
    from benchmarks.vllm.measure import Run

    layout = Layout.parse(options.layout)
    is_first = os.environ.get("RANK", "0") == "0"

    class RankRun(Run):
        """Writes into the file that all layouts share, and stops when the first process says."""

        @property
        def has_time(self) -> bool:
            return self.ranks.first_says(super().has_time)

        def note(self, number: int) -> None:
            self.say(f"round {number + 1}: {self.results.points} points measured")
            self.write(is_complete=False)

        def write(self, is_complete: bool) -> None:
            if not is_first:
                return
            content: dict[str, Any] = {"leanmoe_benchmark": "vllm_parallel", "layouts": {}}
            if options.file.exists():
                content = json.loads(options.file.read_text())
                del content["provenance"]
            made = replace(collect(seed=0), command=os.environ["LEANMOE_BENCHMARK_COMMAND"])
            hidden = ("file", "layout", "beside", "show", "lock")
            content |= {
                "settings": {n: str(v) for n, v in vars(options).items() if n not in hidden},
                "what": self.what,
                "config": self.config,
            }
            content["layouts"][options.layout] = {"gpus": layout.gpus, **self.found(is_complete)}
            write(options.file, made, "measured", content)

        def say(self, what: str) -> None:
            if is_first:
                super().say(f"{options.layout}: {what}")

    run = RankRun(options, layout)
    run.loads = [load for load in run.loads if load >= layout.data]
    run.measure(run.load())
    sys.stdout.flush()
    os._exit(0)  # an orderly end waits for processes that may have ended before


def start(
    options: argparse.Namespace, name: str, seconds: float
) -> tuple[list[Any], list[IO[str]]]:
    """Starts the processes of a layout; all but the first write to a log beside the results."""
    from benchmarks.vllm.layout import Layout

    gpus = Layout.parse(name).gpus
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "benchmarks.vllm.several_gpus",
        *sys.argv[1:],
        "--layout",
        name,
    ]
    command += ["--file", str(options.file), "--seconds", f"{seconds:.0f}"]
    processes, logs = [], []
    for rank in range(gpus):
        log = (options.output / f"{options.file.stem}-{name}-{rank}.log").open("w")
        environment = dict(os.environ)
        if gpus > 1:
            environment |= {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(gpus),
                "LOCAL_WORLD_SIZE": str(gpus), "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }  # fmt: skip
        out = None if rank == 0 else log
        processes.append(
            subprocess.Popen(
                command, env=environment, stdout=out, stderr=log, start_new_session=True
            )
        )
        logs.append(log)
    return processes, logs


def wait(processes: list[Any], seconds: float) -> tuple[str, int]:
    """Until all have ended, one has failed or time is up; what was wrong, if anything, and whose
    log may say why."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        codes = [process.poll() for process in processes]
        failed = [rank for rank, code in enumerate(codes) if code]
        if failed:
            return f"process {failed[0]} ended with {codes[failed[0]]}", failed[0]
        if all(code == 0 for code in codes):
            return "", 0
        time.sleep(0.2)
    return "took too long", 0


def stop(processes: list[Any]) -> None:
    """Ends what still runs of these processes, and what they started."""
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def measure(options: argparse.Namespace, names: list[str]) -> dict[str, str]:
    """Every layout, one after the other, with its share of the time left; what went wrong."""
    end = time.monotonic() + options.seconds
    troubles = {}
    for number, name in enumerate(names):
        share = (end - time.monotonic()) / (len(names) - number)
        if share < 1:
            troubles[name] = "no time left"
            continue
        if trouble := finish(name, start(options, name, share - 5), share + GRACE):
            troubles[name] = trouble
    return troubles


def measure_sharing(options: argparse.Namespace, names: list[str]) -> dict[str, str]:
    """Every layout, all started at the same time; the lock lets one measure. What went wrong."""
    started = {name: start(options, name, options.seconds) for name in names}
    with ThreadPoolExecutor(len(names)) as pool:
        waiting = {name: pool.submit(finish, name, started[name], PATIENCE) for name in names}
        try:
            wait_for(waiting.values())
        finally:  # else nobody would end the processes that the pool's threads wait for
            for processes, _ in started.values():
                stop(processes)
    return {name: found.result() for name, found in waiting.items() if found.result()}


def finish(name: str, started: tuple[list[Any], list[IO[str]]], seconds: float) -> str:
    """Waits for a layout's processes and ends them; what went wrong, with the end of its log."""
    processes, logs = started
    try:
        trouble, rank = wait(processes, seconds)
    finally:
        stop(processes)
        for log in logs:
            log.close()
    for number, log in enumerate(logs):
        if trouble and number == rank:
            last = Path(log.name).read_text()[-3000:]
            print(f"{name}: {trouble}; the end of {log.name}:\n{last}", flush=True)
        else:
            Path(log.name).unlink(missing_ok=True)
    return trouble


def joined(paths: list[Path]) -> dict[str, Any]:
    """The layouts of several runs; ValueError where they are no measure of each other."""
    layouts: dict[str, Any] = {}
    first: dict[str, Any] = {}
    for path in paths:
        try:
            found = json.loads(path.read_text())
            here = same_of(found["settings"]) | {
                name: found["provenance"][name] for name in ("hardware", "versions", "commit")
            }
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"{path} is no result of this benchmark: {error}") from error
        first = first or here
        for name, value in here.items():
            if value != first[name]:
                raise ValueError(
                    f"{path}: {name} is {value!r}, not {first[name]!r} as in {paths[0]}"
                )
        for name, layout in found["layouts"].items():
            if name in layouts:
                raise ValueError(f"{path} has layout {name}, as another file has")
            layouts[name] = layout
    return layouts


def same_of(settings: dict[str, str]) -> dict[str, Any]:
    """The settings that two results must have in common to be compared."""
    names = (
        "shape", "layers", "fp8", "routings", "prompt", "tiles", "no_compile", "small_steps",
        "experts",
    )  # fmt: skip
    return {name: settings[name] for name in names}


def check_beside(options: argparse.Namespace, names: list[str]) -> None:
    """Ends the program before anything is measured that could not stand beside those results."""
    try:
        layouts = joined(options.beside)
    except ValueError as error:
        sys.exit(str(error))
    if both := set(layouts) & set(names):
        sys.exit(f"--beside has layout {both.pop()}, which --layouts measures")
    mine = same_of({name: str(value) for name, value in vars(options).items()})
    for path in options.beside:
        theirs = same_of(json.loads(path.read_text())["settings"])
        for name, value in theirs.items():
            if value != mine[name]:
                sys.exit(f"{path}: {name} is {value!r}, not {mine[name]!r} as here")


def table(paths: list[Path], troubles: dict[str, str]) -> None:
    """All layouts on screen, and last each plan's gain in each of them."""
    from benchmarks.vllm.step_results import show, show_gains

    found = joined(paths)
    for name, layout in found.items():
        print(f"\n===== {name}: {layout['gpus']} GPU{'s' * (layout['gpus'] > 1)}")
        show(layout["lines"], is_parallel=True)
        for variant, reason in layout["left_out"].items():
            print(f"left out: {variant}, {reason}")
        print(
            f"same tokens as stock under the empty plan: {layout['same_tokens_under_empty_plan']}"
        )
    show_gains({name: layout["lines"] for name, layout in found.items()})
    for name, trouble in troubles.items():
        print(f"{name}: {trouble}")
    for path in paths:
        print(path)


def named(path: Path) -> Path:
    """The results under the name that says when, on what and from which commit they are."""
    from benchmarks.common.results import file_of
    from leanmoe.core.provenance import Provenance

    if not path.exists():
        return path
    content = json.loads(path.read_text())
    gpus = max(layout["gpus"] for layout in content["layouts"].values())
    name, made = f"parallel-{content['settings']['shape']}", Provenance(**content["provenance"])
    return path.rename(file_of(path.parent, name, made, f"{gpus}x-"))


def interrupt(*_: Any) -> None:
    """Stops the run once, however often it is told to."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def main() -> None:
    """Runs it."""
    options = parse()
    from benchmarks.vllm.settings import SEVERAL_GPUS, prepare

    prepare(options.vllm, SEVERAL_GPUS)
    if options.layout:
        rank_run(options)
        return
    if options.show:
        try:
            table(options.show, {})
        except ValueError as error:
            sys.exit(str(error))
        return
    from benchmarks.vllm.layout import Layout

    names = options.layouts.split(",")
    try:
        for name in names:
            Layout.parse(name)
    except ValueError as error:
        sys.exit(str(error))
    check_beside(options, names)
    from benchmarks.common.results import command

    os.environ["LEANMOE_BENCHMARK_COMMAND"] = command()
    options.output.mkdir(parents=True, exist_ok=True)
    options.file = options.output / f"{time.strftime('%H%M%S')}-{os.getpid()}-parallel.json"
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    troubles = {}
    try:
        troubles = (measure_sharing if options.lock else measure)(options, names)
    except KeyboardInterrupt:
        troubles = {"all": "stopped"}
    paths = list(filter(Path.exists, [named(options.file)]))
    try:
        table([*options.beside, *paths], troubles)
    except ValueError as error:  # its hardware, versions or commit
        troubles["--beside"] = str(error)
        table(paths, troubles)
    if troubles:
        sys.exit(1)


if __name__ == "__main__":
    main()
