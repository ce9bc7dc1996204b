"""One engine with replayed routing, measured under every variant: what runs have in common.

`one_gpu` measures on one GPU, `several_gpus` on several.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.common.results import collect, file_of, write
from benchmarks.vllm import prefill
from benchmarks.vllm.gpu_lock import GpuLock
from benchmarks.vllm.layout import SINGLE, Layout
from benchmarks.vllm.settings import has_gpu
from benchmarks.vllm.shapes import MLA, config_of, what_it_is
from benchmarks.vllm.step_results import Results, show

BANDED = "banded"
"""A plan of bands, each with the single rule that was fastest at that load in the first round."""
PAUSE = 15
"""Seconds between two times that what was measured is written, within a round."""


class Run:
    """One run: what is measured, and what was."""

    def __init__(self, options: argparse.Namespace, layout: Layout = SINGLE) -> None:
        from benchmarks.vllm.variants import variants_of
        from leanmoe.models.shape import read_shape

        self.options, self.layout, self.started = options, layout, time.perf_counter()
        self.began = self.started
        is_first = os.environ.get("RANK", "0") == "0"
        self._lock = GpuLock(options.lock) if options.lock and is_first else None
        self.loads = [int(part) for part in options.loads.split(",")]
        self.routings = options.routings.split(",")
        self.small_steps, self.experts = options.small_steps.split(","), options.experts.split(",")
        self.config = config_of(options.shape, options.layers, options.fp8)
        self.shape = read_shape(self.config)
        layers = int(str(self.config["num_hidden_layers"]))
        self.what = what_it_is(options.shape, layers, options.fp8)
        self.same_tokens: bool | None = None
        self.repeats: bool | None = None
        """Whether stock vLLM answers with the same tokens twice, without which no plan can."""
        self.variants = variants_of(
            self.shape, options.plans, self.small_steps, self.experts, layout
        )
        self.left_out: dict[str, str] = {}
        """Variants that this engine cannot run, and why."""
        self.results = Results()
        self.prefill: list[dict[str, Any]] = []
        self._written = self.started
        self.is_complete = False
        """Whether what was last written has all rounds."""

    @property
    def has_time(self) -> bool:
        return bool(time.perf_counter() - self.began < self.options.seconds)

    def load(self) -> Any:
        """The engine, with every variant's decode steps captured."""
        from vllm import LLM

        from benchmarks.vllm.replay import Engine, Replay, reference_use

        sizes = [load // self.layout.data for load in self.loads]
        longest = max([0, *map(int, filter(None, self.options.prefill.split(",")))])
        rows = max(2048, max(sizes) * self.options.prompt, longest)
        folder = Path(tempfile.mkdtemp())
        (folder / "config.json").write_text(json.dumps(self.config))
        settings: dict[str, Any] = {
            "load_format": "dummy", "dtype": "bfloat16",
            "skip_tokenizer_init": True, "generation_config": "vllm",
            "max_model_len": max(512, longest + 16), "max_num_seqs": max(sizes),
            "max_num_batched_tokens": rows,
            "enable_prefix_caching": False, "gpu_memory_utilization": self.options.memory,
        }  # fmt: skip
        if self.options.lock:
            settings["kv_cache_memory_bytes"] = int(self.options.cache_gib * 2**30)
        settings |= self.layout.settings()
        settings |= _on_gpu(sizes, self.options) if has_gpu() else {"enforce_eager": True}
        if self.options.tiles:
            from leanmoe.core.provenance import hardware

            give_tiles(self.options.tiles, self.shape.experts, self.shape.expert_width, hardware())
        llm = LLM(model=str(folder), **settings)
        self.say(f"engine loaded: {self.what}")
        engine = Engine(llm, Replay(self.shape.experts, rows, reference_use()), self.layout)
        self.ranks = engine.ranks
        if engine.layers != len(self.shape.moe_layers):
            sys.exit(f"{engine.layers} MoE layers were found, not {len(self.shape.moe_layers)}")
        if has_gpu() and not engine.is_captured:
            sys.exit("this vLLM's captured steps cannot be exchanged: use 0.24.0 or 0.26.0")
        asked, self.variants = self.variants, []
        for variant in asked:
            self._add(engine, variant)
        self.say(f"{len(self.variants)} variants captured")
        stock, empty = (variant.name for variant in self.variants[:2])
        self.same_tokens = engine.is_same(stock, empty)
        self.repeats = engine.is_same(stock, stock)
        return engine

    def _add(self, engine: Any, variant: Any) -> None:
        """Captures a variant, unless the engine cannot run it."""
        variant = engine.settled(variant)
        if reason := engine.why_not(variant):
            self.left_out[variant.name] = reason
            self.say(f"left out: {variant.name}, {reason}")
        else:
            engine.add(variant)
            self.variants.append(variant)

    def measure(self, engine: Any) -> None:
        """Rounds until there is no more time; what there is is written as they go."""
        self._wait_for_gpus()
        for number in range(self.options.rounds):
            for routing in self.routings:
                engine.replay.draw(routing, seed=number)
                for load in self.loads:
                    if self.has_time:
                        self._point(engine, routing, load, number)
                        self.note(number)
            if number == 0 and self.has_time and self.options.banded:
                self._add_banded(engine)
            is_last = number == self.options.rounds - 1 or not self.has_time
            self.write(is_complete=is_last and self.has_time)
            self.say(f"round {number + 1} written")
            if not self.has_time:
                return

    def _wait_for_gpus(self) -> None:
        """Its time begins, where other runs share the GPUs when these are this one's."""
        if self.options.lock:
            if self._lock is not None:
                self._lock.take()
            self.ranks.first_says(True)
            self.say("the GPUs are this run's")
        self.began = self._written = time.perf_counter()

    def _add_banded(self, engine: Any) -> None:
        """Puts the fastest single rule of each load into a plan of its own."""
        from benchmarks.vllm.variants import VLLM, Variant
        from leanmoe.plan import Band, Plan

        singles = {
            variant.name: variant.plan
            for variant in self.variants
            if variant.plan
            and variant.experts == VLLM
            and not (variant.is_second or variant.cross_rank)
        }
        bands: list[Band] = []
        for number, load in enumerate(self.loads):
            fastest = min(
                singles, key=lambda variant: self.results.mean_step(load, variant, self.routings)
            )
            up_to = load if number < len(self.loads) - 1 else None
            rules = singles[fastest].bands[0].rules
            if bands and bands[-1].rules == rules:
                bands.pop()
            bands.append(Band(up_to, rules))
            self.say(f"fastest at {load}: {fastest}")
        plan = Plan.banded(self.shape.fingerprint(), tuple(bands))
        self._add(engine, Variant(BANDED, plan, self.small_steps[0]))

    def _point(self, engine: Any, routing: str, load: int, number: int) -> None:
        names = [variant.name for variant in self.variants if variant.is_worth(load)]
        order = random.Random(number * 1000 + load).sample(names, len(names))
        for variant in order:
            engine.select(variant)
            took, tokens = engine.decode(load, self.options.prompt, self.options.steps)
            add = partial(self.results.add, number, (routing, load, variant))
            add("tokens_per_second", tokens / took)
            add("tpot_ms", took * load / tokens * 1e3)
            if not engine.is_captured:
                self.results.see((routing, load, variant), engine.experts(variant, load))
        if engine.is_captured:  # all from the same state, the last request's
            for variant in order * self.options.samples:
                rows = load // self.layout.data
                took = engine.step_seconds(rows, variant, self.options.replays)
                self.results.add(number, (routing, load, variant), "step_ms", took * 1e3)
            for variant in order:
                self.results.see((routing, load, variant), engine.experts(variant, load))

    def note(self, number: int) -> None:
        """After each load of a round: says how far it is, and writes where that was long ago."""
        if time.perf_counter() - self._written > PAUSE:
            self.say(f"round {number + 1}: {self.results.points} points measured")
            self.write(is_complete=False)

    def found(self, is_complete: bool) -> dict[str, Any]:
        """What was measured, as JSON values."""
        return {
            "is_complete": is_complete,
            "same_tokens_under_empty_plan": self.same_tokens,
            "stock_repeats_its_tokens": self.repeats,
            "variants": {variant.name: variant.to_json() for variant in self.variants},
            "left_out": self.left_out,
            "lines": self.results.lines(self.variants),
            "prefill": self.prefill,
        }

    def write(self, is_complete: bool) -> None:
        """The results as they are."""
        self._written, self.is_complete = time.perf_counter(), is_complete
        content = {
            "what": self.what,
            "settings": {n: str(v) for n, v in vars(self.options).items()},
            "config": self.config,
            **self.found(is_complete),
        }
        name = f"{self.options.shape}{'-fp8' if self.options.fp8 else ''}"
        if self.options.runner:
            name += f"-{self.options.runner}"
        made = collect(seed=0)
        self.path = file_of(self.options.output, f"vllm-{name}", made)
        write(self.path, made, "measured", {"leanmoe_benchmark": "vllm_gpu", **content})

    def say(self, what: str) -> None:
        print(f"{time.perf_counter() - self.started:6.0f} s  {what}", flush=True)

    def table(self) -> None:
        """The results on screen."""
        show(self.results.lines(self.variants))
        prefill.show(self.prefill)
        print(f"\nsame tokens as stock under the empty plan: {self.same_tokens}")
        print(f"same tokens by stock twice: {self.repeats}")
        print(self.path)


def give_tiles(results: Path, experts: int, width: int, gpu: str) -> None:
    """Gives vLLM the tiles that `kernels.experts_gpu` found fastest for bf16 experts of this width.

    Tokens at which its own choice was the fastest are left out, so the nearest others serve them.
    """
    found = json.loads(results.read_text())["vllm"]["tiles"]
    table = {
        name.partition("T=")[2]: tiles
        for name, tiles in found.items()
        if name.startswith(f"bfloat16 {width} ") and isinstance(tiles, dict)
    }
    if not table:
        sys.exit(f"{results} has no tiles for experts {width} wide")
    folder = Path(tempfile.mkdtemp())
    name = f"E={experts},N={width},device_name={gpu.replace(' ', '_')}.json"
    (folder / name).write_text(json.dumps(table))
    os.environ["VLLM_TUNED_CONFIG_FOLDER"] = str(folder)


def _on_gpu(sizes: list[int], options: argparse.Namespace) -> dict[str, Any]:
    """Settings that ran on an H200; MLA models leave attention to vLLM."""
    compilation: dict[str, Any] = {
        "cudagraph_mode": "FULL_DECODE_ONLY",
        "cudagraph_capture_sizes": sizes,
        "cudagraph_num_of_warmups": 1,
    }
    if getattr(options, "no_compile", False):
        compilation["mode"] = 0
    found: dict[str, Any] = {"moe_backend": "triton", "compilation_config": compilation}
    if getattr(options, "no_custom_all_reduce", False):
        found["disable_custom_all_reduce"] = True
    if options.shape not in MLA:
        found["attention_config"] = {"backend": "FLASH_ATTN", "flash_attn_version": 3}
    return found
