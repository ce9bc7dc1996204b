"""One engine with replayed routing, measured under every plan in turn: what a run has in common.

`vllm_gpu.py` measures on one GPU, `vllm_parallel.py` on several.
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
from statistics import median
from typing import Any

from vllm_layout import SINGLE, Layout
from vllm_shapes import config_of

OF_ALL = "company=all"
"""Word of a plan's description: tokens share experts with those of all data-parallel ranks."""
BANDED = "banded"
"""A plan of bands, each with the single rule that was fastest at that load in the first round."""
USE = Path(__file__).parent / "results/2026-11-23-intel-r-xeon-r-processor-demo.json"
"""A committed run of the reference model, for how often its experts are used."""


class Run:
    """One run: what is measured, and what was."""

    def __init__(self, options: argparse.Namespace, layout: Layout = SINGLE) -> None:
        from leanmoe.shape import read_shape

        self.options, self.layout, self.started = options, layout, time.perf_counter()
        self.loads = [int(part) for part in options.loads.split(",")]
        self.routings = options.routings.split(",")
        self.config = config_of(options.shape, options.layers, options.fp8)
        self.shape = read_shape(self.config)
        self.same_tokens: bool | None = None
        self.plans = self._plans()
        self.samples: dict[tuple[str, int, str], dict[str, dict[int, list[float]]]] = {}
        """By routing, requests and way: by name and round, what was measured."""
        self.seen: dict[tuple[str, int, str], list[Any]] = {}

    def _plans(self) -> dict[str, Any]:
        """The plans that mean something of their own in this layout, by name."""
        from vllm_replay import Way

        from leanmoe.plan import Plan

        model = self.shape.fingerprint()
        found: dict[str, Any] = {"empty plan": Way(Plan.uniform(model, self.rule("")))}
        for part in self.options.plans.split(";"):
            name, _, fields = part.partition(":")
            if not name.strip():
                continue
            is_of_all = OF_ALL in fields.split()
            rule = self.rule(fields.replace(OF_ALL, ""))
            is_on_one = rule.budget_per_rank is not None and self.layout.expert_ranks == 1
            if is_on_one or (is_of_all and self.layout.data == 1):
                continue
            found[name.strip()] = Way(Plan.uniform(model, rule), is_of_all)
        for way in found.values():
            way.plan.check(model)
        return found

    def rule(self, text: str) -> Any:
        """A rule from `field=value` words; a fraction is a share of the experts."""
        from leanmoe.plan import Rule

        fields: dict[str, Any] = {}
        for word in text.split():
            name, _, value = word.partition("=")
            if "/" in value:
                above, below = value.split("/")
                fields[name] = self.shape.experts * int(above) // int(below)
            else:
                fields[name] = json.loads(value or "true")
        return Rule.from_json(fields)

    @property
    def has_time(self) -> bool:
        return time.perf_counter() - self.started < self.options.seconds

    def load(self) -> Any:
        """The engine, with every way's decode steps captured."""
        from vllm import LLM
        from vllm_replay import STOCK, Engine, Replay

        use = [layer["use"] for layer in json.loads(USE.read_text())["profile"]["layers"]]
        sizes = [load // self.layout.data for load in self.loads]
        rows = max(2048, max(sizes) * self.options.prompt)
        folder = Path(tempfile.mkdtemp())
        (folder / "config.json").write_text(json.dumps(self.config))
        settings: dict[str, Any] = {
            "load_format": "dummy", "dtype": "bfloat16",
            "skip_tokenizer_init": True, "generation_config": "vllm",
            "max_model_len": 512, "max_num_seqs": max(sizes), "max_num_batched_tokens": rows,
            "enable_prefix_caching": False, "gpu_memory_utilization": self.options.memory,
        }  # fmt: skip
        settings |= self.layout.settings()
        settings |= self._on_gpu(sizes) if _has_gpu() else {"enforce_eager": True}
        if self.options.tiles:
            from leanmoe.provenance import hardware

            give_tiles(self.options.tiles, self.shape.experts, self.shape.expert_width, hardware())
        llm = LLM(model=str(folder), **settings)
        self.say("engine loaded")
        replay = Replay(self.shape.experts, rows, use)
        engine = Engine(llm, self.plans, replay, self.layout)
        self.ranks = engine.ranks
        if engine.layers != len(self.shape.moe_layers):
            sys.exit(f"{engine.layers} MoE layers were found, not {len(self.shape.moe_layers)}")
        if _has_gpu() and not engine.is_captured:
            sys.exit("this vLLM's captured steps cannot be exchanged: use 0.24.0")
        self.ways = [STOCK, *self.plans]
        for way in self.ways:
            engine.capture(way)
        self.say(f"{len(self.ways)} ways captured")
        self.same_tokens = engine.is_same(*self.ways[:2])
        return engine

    def _on_gpu(self, sizes: list[int]) -> dict[str, Any]:
        """Settings that ran on an H200; MLA models leave attention to vLLM."""
        compilation: dict[str, Any] = {
            "cudagraph_mode": "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": sizes,
            "cudagraph_num_of_warmups": 1,
        }
        if getattr(self.options, "no_compile", False):
            compilation["mode"] = 0
        found: dict[str, Any] = {"moe_backend": "triton", "compilation_config": compilation}
        if getattr(self.options, "no_custom_all_reduce", False):
            found["disable_custom_all_reduce"] = True
        if self.options.shape != "deepseek-v3":
            found["attention_config"] = {"backend": "FLASH_ATTN", "flash_attn_version": 3}
        return found

    def measure(self, engine: Any) -> None:
        """Rounds until there is no more time; each writes what it has."""
        for number in range(self.options.rounds):
            for routing in self.routings:
                engine.replay.draw(routing, seed=number)
                for load in self.loads:
                    if self.has_time:
                        self._point(engine, routing, load, number)
                        self.note(number)
            if number == 0 and self.has_time:
                self._add_banded(engine)
            is_last = number == self.options.rounds - 1 or not self.has_time
            self.write(is_complete=is_last and self.has_time)
            self.say(f"round {number + 1} written")
            if not self.has_time:
                return

    def _add_banded(self, engine: Any) -> None:
        """Puts the fastest single rule of each load into a plan of its own."""
        from vllm_replay import Way

        from leanmoe.plan import Band, Plan

        bands: list[Band] = []
        for number, load in enumerate(self.loads):
            single = [name for name, way in self.plans.items() if not way.is_of_all]
            fastest = min(single, key=lambda way: self._mean_step(load, way))
            up_to = load if number < len(self.loads) - 1 else None
            rules = self.plans[fastest].plan.bands[0].rules
            if bands and bands[-1].rules == rules:
                bands.pop()
            bands.append(Band(up_to, rules))
            self.say(f"fastest at {load}: {fastest}")
        self.plans[BANDED] = Way(Plan(self.shape.fingerprint(), tuple(bands)))
        engine.add(BANDED, self.plans[BANDED])
        self.ways.append(BANDED)

    def _mean_step(self, load: int, way: str) -> float:
        """Milliseconds a step so far, over all routings."""
        found = []
        for routing in self.routings:
            values = self.samples[routing, load, way]
            rounds = values.get("step_ms", values["tpot_ms"])
            found.append(median(sample for samples in rounds.values() for sample in samples))
        return sum(found) / len(found)

    def _point(self, engine: Any, routing: str, load: int, number: int) -> None:
        order = random.Random(number * 1000 + load).sample(self.ways, len(self.ways))
        for way in order:
            engine.select(way)
            took, tokens = engine.decode(load, self.options.prompt, self.options.steps)
            add = partial(self._add, number, routing, load, way)
            add("tokens_per_second", tokens / took)
            add("tpot_ms", took * load / tokens * 1e3)
            if not engine.is_captured:
                self._see(engine, routing, load, way)
        if engine.is_captured:  # all from the same state, the last request's
            for way in order * self.options.samples:
                rows = load // self.layout.data
                took = engine.step_seconds(rows, way, self.options.replays)
                self._add(number, routing, load, way, "step_ms", took * 1e3)
            for way in order:
                self._see(engine, routing, load, way)

    def _see(self, engine: Any, routing: str, load: int, way: str) -> None:
        found = engine.experts(way, load)
        self.seen.setdefault((routing, load, way), []).append(found)

    def _add(self, number: int, routing: str, load: int, way: str, name: str, value: float) -> None:
        point = self.samples.setdefault((routing, load, way), {})
        point.setdefault(name, {}).setdefault(number, []).append(value)

    def lines(self) -> list[dict[str, Any]]:
        """One entry for each routing, load and way."""
        found = []
        for (routing, load, way), values in self.samples.items():
            stock = self.samples[routing, load, self.ways[0]]
            entry: dict[str, Any] = {"routing": routing, "requests": load, "plan": way}
            for name, rounds in values.items():
                entry[name] = interval(
                    [sample for samples in rounds.values() for sample in samples]
                )
                is_rate = name == "tokens_per_second"
                pairs = [p for n, s in rounds.items() for p in zip(stock[name][n], s, strict=False)]
                entry[f"gain_{name}"] = interval([b / a if is_rate else a / b for a, b in pairs])
            if seen := self.seen.get((routing, load, way)):
                mean = {
                    name: sum(getattr(one, name) for one in seen) / len(seen)
                    for name in ("distinct", "most_loaded", "activated")
                }
                entry |= {name: round(value, 3) for name, value in mean.items()}
                ranks = zip(*(one.by_rank for one in seen), strict=True)
                entry["distinct_by_rank"] = [round(sum(r) / len(r), 2) for r in ranks]
            found.append(entry)
        return found

    def note(self, number: int) -> None:
        """After each load of a round; nothing is written yet."""

    def write(self, is_complete: bool) -> None:
        """The results as they are."""
        from leanmoe.provenance import collect
        from leanmoe.storage import write_json

        provenance = collect(" ".join(sys.argv), seed=0).to_json()
        hardware = provenance["hardware"].lower().replace(" ", "-")
        name = f"{provenance['date'][:10]}-{hardware}-{provenance['commit']}"
        shape = f"{self.options.shape}{'-fp8' if self.options.fp8 else ''}"
        path = self.options.output / f"{name}-vllm-{shape}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "leanmoe_benchmark": "vllm_gpu",
            "label": "measured",
            **self.found(is_complete),
            "provenance": provenance,
            "settings": {n: str(v) for n, v in vars(self.options).items()},
            "config": self.config,
        }
        write_json(path, content)
        self.path = path

    def found(self, is_complete: bool) -> dict[str, Any]:
        """What was measured, as JSON values."""
        plans = {name: way.plan.to_json()["bands"] for name, way in self.plans.items()}
        # One rule says it for all layers here: what is the same in each is not written 48 times.
        for bands in plans.values():
            for band in bands:
                band["rules"] = band["rules"][:1]
        return {
            "is_complete": is_complete,
            "same_tokens_under_empty_plan": self.same_tokens,
            "plans": plans,
            "lines": self.lines(),
        }

    def say(self, what: str) -> None:
        print(f"{time.perf_counter() - self.started:6.0f} s  {what}", flush=True)

    def table(self) -> None:
        """The results on screen: captured steps if there are any, then whole engine steps."""
        print_lines(self.lines())
        print(f"\nsame tokens as stock under the empty plan: {self.same_tokens}")
        print(self.path)


def print_lines(entries: list[dict[str, Any]], is_parallel: bool = False) -> None:
    """A table for each routing and time; of several ranks also the experts of the fullest."""
    lines = {(e["routing"], e["requests"], e["plan"]): e for e in entries}
    routings, loads, ways = (list(dict.fromkeys(key[i] for key in lines)) for i in range(3))
    most = ", of the most loaded GPU" if is_parallel else ""
    for name in ("step_ms", "tpot_ms", "tokens_per_second"):
        if not any(name in entry for entry in lines.values()):
            continue
        for routing in routings:
            print(f"\n{routing} routing: {name}, gain over stock, distinct experts a layer{most}")
            print(f"{'requests':>8} " + " ".join(f"{way:>20}" for way in ways))
            for load in loads:
                found = [lines.get((routing, load, way)) for way in ways]
                cells = [_cell(entry, name, is_parallel) for entry in found]
                print(f"{load:>8} " + " ".join(f"{cell:>20}" for cell in cells))


def gains(layouts: dict[str, list[dict[str, Any]]]) -> None:
    """Each plan's gain at each load, one layout beside the other, and the fullest GPU's experts."""
    has_steps = any("step_ms" in entry for found in layouts.values() for entry in found)
    name = "step_ms" if has_steps else "tpot_ms"
    by_key = {
        (e["routing"], e["plan"], e["requests"], layout): e
        for layout, found in layouts.items()
        for e in found
    }
    heads = list(dict.fromkeys(key[:2] for key in by_key))
    for routing, plan in heads:
        loads = sorted({key[2] for key in by_key if key[:2] == (routing, plan)})
        print(f"\n{routing} routing, {plan}: gain in {name}, experts of the most loaded GPU")
        print(f"{'requests':>8} " + " ".join(f"{layout:>14}" for layout in layouts))
        for load in loads:
            cells = []
            for layout in layouts:
                entry = by_key.get((routing, plan, load, layout))
                known = entry is not None and f"gain_{name}" in entry
                cells.append(
                    f"{entry[f'gain_{name}']['median']:.2f}x {entry.get('most_loaded', 0):.0f}"
                    if entry is not None and known
                    else "-"
                )
            print(f"{load:>8} " + " ".join(f"{cell:>14}" for cell in cells))


def give_tiles(results: Path, experts: int, width: int, gpu: str) -> None:
    """Gives vLLM the tiles that `experts_gpu.py` found fastest for bf16 experts of this width.

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


def interval(samples: list[float]) -> dict[str, Any]:
    """Median and the 95% interval of the median over 2,000 resamples."""
    generator, count = random.Random(0), len(samples)
    drawn = sorted(median(generator.choices(samples, k=count)) for _ in range(2000))
    low, high = drawn[int(0.025 * 2000)], drawn[int(0.975 * 2000) - 1]
    return {"median": _short(median(samples)), "low": _short(low), "high": _short(high), "n": count}


def _short(value: float) -> float:
    return float(f"{value:.5g}")


def _cell(entry: dict[str, Any] | None, name: str, is_parallel: bool) -> str:
    if entry is None or name not in entry:
        return "-"
    gain = entry[f"gain_{name}"]["median"]
    found = f"{entry[name]['median']:.4g} {gain:.2f}x {entry.get('distinct', 0):.0f}"
    return f"{found} {entry.get('most_loaded', 0):.0f}" if is_parallel else found


def _has_gpu() -> bool:
    import torch

    return bool(torch.cuda.is_available())
