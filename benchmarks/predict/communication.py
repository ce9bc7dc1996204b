"""How long do collectives take between the GPUs of this machine, and what does the planner say?

    python -m benchmarks.predict.communication

All-reduce, all-gather, reduce-scatter and all-to-all by message size, through torch.distributed:
NCCL in a captured graph that is replayed, or gloo between processes of a CPU. Medians over
samples, each the slowest rank's. The bytes are those that one rank adds up (all-reduce,
reduce-scatter), has at the end (all-gather) or sends to all, itself included
(all-to-all). `collective_rates` makes constants of the file.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from benchmarks.common.results import collect, command, file_of, parser_of, write

OPERATIONS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
KIB = 1024
SMALLEST, LARGEST = KIB, 256 * KIB * KIB
NO_MULTICAST = {
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "NVSHMEM_DISABLE_NVLS": "1",
}
TIMED_BYTES = 64 * KIB * KIB
"""A sample's calls move about so much in all, and are 1 to 20."""


def parse() -> argparse.Namespace:
    """The command line."""
    parser = parser_of(__doc__)
    parser.add_argument("--ranks", type=int, help="processes; the GPUs of this machine")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="cuda where there is a GPU")
    parser.add_argument("--largest", type=int, default=LARGEST, help="bytes of a message, at most")
    parser.add_argument("--eager", action="store_true", help="call by call, not in a graph")
    parser.add_argument("--samples", type=int, default=9)
    parser.add_argument("--gpu", help="the planner's name for the GPU, like h100")
    return parser.parse_args()


def message_sizes(largest: int) -> list[int]:
    """From 1 KiB up, by fours."""
    sizes = [SMALLEST]
    while sizes[-1] * 4 <= largest:
        sizes.append(sizes[-1] * 4)
    return sizes


def call_of(name: str, size: int, ranks: int, device: torch.device) -> Callable[[], Any]:
    """One call of an operation with messages of so many bytes, in bfloat16."""
    whole = torch.zeros(size // 2, dtype=torch.bfloat16, device=device)
    part = torch.zeros(size // 2 // ranks, dtype=torch.bfloat16, device=device)
    whole = whole[: part.numel() * ranks]
    other = torch.empty_like(whole)
    parts = [list(x.chunk(ranks)) for x in (whole, other)]
    is_gloo = dist.get_backend() == "gloo"
    if name == "all_reduce":
        return lambda: dist.all_reduce(whole)
    if name == "all_gather":
        if is_gloo:
            return lambda: dist.all_gather(parts[0], part)
        return lambda: dist.all_gather_into_tensor(whole, part)
    if name == "reduce_scatter":
        if is_gloo:
            return lambda: dist.reduce_scatter(part, parts[0])
        return lambda: dist.reduce_scatter_tensor(part, whole)
    return lambda: dist.all_to_all_single(other, whole)


def samples_of(
    call: Callable[[], Any], calls: int, options: argparse.Namespace, device: torch.device
) -> list[float]:
    """Seconds of a call, of this rank, sample by sample."""
    for _ in range(2):
        call()
    if device.type == "cpu":
        found = []
        for _ in range(options.samples):
            dist.barrier()
            started = time.perf_counter()
            several(call, calls)
            found.append((time.perf_counter() - started) / calls)
        return found
    torch.cuda.synchronize()
    replay: Callable[[], None] = partial(several, call, calls)
    if not options.eager:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            replay()
        replay = graph.replay
    replay()
    found = []
    for _ in range(options.samples):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        dist.barrier()
        start.record()
        replay()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) / 1e3 / calls)
    return found


def several(call: Callable[[], Any], calls: int) -> None:
    """So many calls."""
    for _ in range(calls):
        call()


def slowest(samples: list[float], device: torch.device) -> list[float]:
    """Each sample as the slowest rank had it."""
    found = torch.tensor(samples, dtype=torch.float64, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return [float(value) for value in found]


def run(rank: int, options: argparse.Namespace, store: str) -> None:
    """One rank; the first writes what all measured, after every size."""
    device = torch.device("cpu")
    if options.device == "cuda":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    backend = "nccl" if options.device == "cuda" else "gloo"
    extra: dict[str, Any] = {"device_id": device} if device.type == "cuda" else {}
    dist.init_process_group(
        backend, f"file://{store}", rank=rank, world_size=options.ranks, **extra
    )
    seconds: dict[str, dict[str, Any]] = {name: {} for name in OPERATIONS}
    for size in message_sizes(options.largest):
        for name in OPERATIONS:
            calls = min(20, max(1, TIMED_BYTES // size))
            call = call_of(name, size, options.ranks, device)
            found = slowest(samples_of(call, calls, options, device), device)
            seconds[name][str(size)] = {
                "median": median(found), "low": min(found), "high": max(found),
            }  # fmt: skip
        if rank == 0:
            write_seconds(options, seconds, size == message_sizes(options.largest)[-1])
    if rank == 0:
        table(options, seconds)
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)


def write_seconds(options: argparse.Namespace, seconds: dict[str, Any], is_complete: bool) -> None:
    """The results as they are."""
    made = replace(collect(seed=0), command=options.command)
    options.path = file_of(options.output, "communication", made, f"{options.ranks}x-")
    content = {
        "leanmoe_benchmark": "communication", "is_complete": is_complete,
        "gpus": options.ranks, "device": options.device, "is_eager": options.eager,
        "environment": {n: v for n, v in os.environ.items() if n.startswith("NCCL_")},
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if options.device == "cuda" else None,
        "seconds": seconds,
    }  # fmt: skip
    write(options.path, made, "measured", content)


def table(options: argparse.Namespace, seconds: dict[str, Any]) -> None:
    """Microseconds by size, and beside them what the planner takes, before and after a fit."""
    said = predicted(options)
    heads = [*OPERATIONS, *(f"{kind} {name}" for kind in said for name in said[kind])]
    print(f"{'KiB':>8} " + " ".join(f"{head:>21}" for head in heads))
    for size in message_sizes(options.largest):
        cells = [f"{seconds[name][str(size)]['median'] * 1e6:.1f}" for name in OPERATIONS]
        cells += [f"{call(size) * 1e6:.1f}" for calls in said.values() for call in calls.values()]
        print(f"{size // KIB:>8} " + " ".join(f"{cell:>21}" for cell in cells))
    print(options.path)


def predicted(options: argparse.Namespace) -> dict[str, dict[str, Callable[[int], float]]]:
    """What the planner says of collectives: as it ships, and fitted to these."""
    from benchmarks.predict.collective_rates import fitted, read_collectives
    from leanmoe.core.provenance import hardware
    from leanmoe.predict.constants import shipped
    from leanmoe.predict.hardware.collectives import (
        gather_seconds,
        library_reduce_seconds,
        reduce_seconds,
    )
    from leanmoe.predict.hardware.gpus import read_gpu

    names = (
        [options.gpu]
        if options.gpu
        else [n for n in ("h200", "h100", "b200", "a100") if n in hardware().lower()]
    )
    if not names:
        print("no --gpu: the planner's prediction is not shown")
        return {}
    gpu, ranks = read_gpu(names[0]), options.ranks
    before, _ = shipped().rates_for(gpu.name)
    after = fitted(before, read_collectives(options.path), gpu)
    print(f"fitted: {after}")

    def calls(rates: Any) -> dict[str, Callable[[int], float]]:
        return {
            "reduce": lambda size: reduce_seconds(rates, gpu, size, ranks),
            "NCCL's reduce": lambda size: library_reduce_seconds(rates, gpu, size, ranks),
            "gather": lambda size: gather_seconds(rates, gpu, size, ranks),
            "all-to-all": lambda size: (
                rates.exchange_seconds
                + (ranks - 1) / ranks * size / (gpu.link * rates.exchange_bandwidth)
            ),
        }

    return {"planned": calls(before), "fitted": calls(after)}


def main() -> None:
    """Runs it."""
    import tempfile

    options = parse()
    os.environ |= {name: value for name, value in NO_MULTICAST.items() if name not in os.environ}
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    options.ranks = options.ranks or (torch.cuda.device_count() if options.device == "cuda" else 2)
    if options.ranks < 2:
        sys.exit(f"--ranks is {options.ranks}: at least 2 must talk to each other")
    options.command = command()
    with tempfile.TemporaryDirectory() as folder:
        spawn(run, (options, f"{folder}/group"), nprocs=options.ranks)


if __name__ == "__main__":
    main()
