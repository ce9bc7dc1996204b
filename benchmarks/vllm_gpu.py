"""How much faster does vLLM decode under a plan on one GPU, at each load?

    python benchmarks/vllm_gpu.py --shape qwen3-30b-a3b --output results --seconds 500

One engine with dummy weights is loaded once; each plan's decode steps are captured anew, so that
stock vLLM and all plans are measured in turn, in an order that changes from round to round. After
the first round a plan with bands is made of the rules that were fastest, and joins the others. Two
times are taken: that of the model's captured step alone, and that of whole engine steps with
scheduler and sampler. Routing is replayed (vllm_replay.py): drawn evenly, and with the skew of the
reference model. Written after each round, whatever comes next. Shown are medians with 95%
intervals (bootstrap), gains paired by round.
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

sys.path.insert(0, str(Path(__file__).parent))

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_USE_DEEP_GEMM": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
}
LOADS = "1,2,4,8,16,32,64,128,256,512"
PLANS = (
    "k=6: top_k=6; k=4: top_k=4; guaranteed=3: guaranteed=3; guaranteed=4: guaranteed=4; "
    "guaranteed=5: guaranteed=5; budget: budget=3/8"
)
BANDED = "banded"
"""A plan of bands, each with the single rule that was fastest at that load in the first round."""
USE = Path(__file__).parent / "results/2026-11-23-intel-r-xeon-r-processor-demo.json"
"""A committed run of the reference model, for how often its experts are used."""
QWEN = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 2048,
    "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
    "moe_intermediate_size": 768, "intermediate_size": 6144, "num_experts": 128,
    "num_experts_per_tok": 8, "norm_topk_prob": True, "vocab_size": 151936,
    "decoder_sparse_step": 1, "mlp_only_layers": [], "max_position_embeddings": 40960,
    "rope_theta": 1000000.0, "rms_norm_eps": 1e-6, "hidden_act": "silu",
    "tie_word_embeddings": False,
}  # fmt: skip
DEEPSEEK = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "hidden_size": 7168,
    "num_hidden_layers": 3, "first_k_dense_replace": 1, "num_attention_heads": 128,
    "num_key_value_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "v_head_dim": 128, "moe_intermediate_size": 2048,
    "intermediate_size": 18432, "n_routed_experts": 256, "num_experts_per_tok": 8,
    "n_shared_experts": 1, "n_group": 8, "topk_group": 4, "topk_method": "noaux_tc",
    "scoring_func": "sigmoid", "norm_topk_prob": True, "routed_scaling_factor": 2.5,
    "vocab_size": 129280, "max_position_embeddings": 4096, "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": False, "moe_layer_freq": 1,
}  # fmt: skip
FP8 = {
    "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}  # fmt: skip
TINY = QWEN | {
    "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 32, "moe_intermediate_size": 64, "intermediate_size": 128, "num_experts": 16,
    "num_experts_per_tok": 8, "vocab_size": 512,
}  # fmt: skip
SHAPES = {"qwen3-30b-a3b": QWEN, "deepseek-v3": DEEPSEEK, "tiny": TINY}
"""Published shapes; deepseek-v3 has as many layers as fit one GPU (--layers)."""


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-30b-a3b")
    parser.add_argument("--layers", type=int, help="decoder layers, in place of the shape's own")
    parser.add_argument("--fp8", action="store_true", help="weights in blocks of fp8")
    parser.add_argument("--loads", default=LOADS, help="requests at once, comma separated")
    parser.add_argument("--plans", default=PLANS, help="name: field=value field=value; ...")
    parser.add_argument("--routings", default="skewed,uniform")
    parser.add_argument("--prompt", type=int, default=16, help="tokens of each prompt")
    parser.add_argument("--steps", type=int, default=16, help="engine steps a measurement")
    parser.add_argument("--replays", type=int, default=6, help="captured steps a measurement")
    parser.add_argument("--samples", type=int, default=3, help="of the captured step, a round")
    parser.add_argument("--rounds", type=int, default=7, help="at most")
    parser.add_argument("--seconds", type=float, default=500, help="stop after so many, all told")
    parser.add_argument("--output", type=Path, default=Path("results"))
    parser.add_argument(
        "--vllm", default="installed", help="'installed', or a folder to find it in"
    )
    parser.add_argument(
        "--tiles", type=Path, help="results of experts_gpu.py: the tiles found there for vLLM"
    )
    parser.add_argument("--memory", type=float, default=0.86, help="share of the GPU's for vLLM")
    return parser.parse_args()


class Run:
    """One run: what is measured, and what was."""

    def __init__(self, options: argparse.Namespace) -> None:
        from leanmoe.shape import read_shape

        self.options, self.started = options, time.perf_counter()
        self.loads = [int(part) for part in options.loads.split(",")]
        self.routings = options.routings.split(",")
        config = dict(SHAPES[options.shape])
        if options.layers:
            config["num_hidden_layers"] = options.layers
        if options.fp8:
            config["quantization_config"] = FP8
        self.config = config
        self.shape = read_shape(config)
        self.same_tokens: bool | None = None
        self.plans = self._plans()
        self.samples: dict[tuple[str, int, str], dict[str, dict[int, list[float]]]] = {}
        """By routing, requests and way: by name and round, what was measured."""
        self.seen: dict[tuple[str, int, str], list[tuple[float, float]]] = {}

    def _plans(self) -> dict[str, Any]:
        from leanmoe.plan import Plan

        model = self.shape.fingerprint()
        found: dict[str, Any] = {"empty plan": Plan.uniform(model, self.rule(""))}
        for part in self.options.plans.split(";"):
            name, _, fields = part.partition(":")
            if name.strip():
                found[name.strip()] = Plan.uniform(model, self.rule(fields))
        for plan in found.values():
            plan.check(model)
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
        rows = max(2048, max(self.loads) * self.options.prompt)
        folder = Path(tempfile.mkdtemp())
        (folder / "config.json").write_text(json.dumps(self.config))
        settings: dict[str, Any] = {
            "load_format": "dummy", "dtype": "bfloat16",
            "skip_tokenizer_init": True, "generation_config": "vllm",
            "max_model_len": 512, "max_num_seqs": max(self.loads), "max_num_batched_tokens": rows,
            "enable_prefix_caching": False, "gpu_memory_utilization": self.options.memory,
        }  # fmt: skip
        settings |= _on_gpu(self.loads, self.options.shape) if _has_gpu() else {
            "enforce_eager": True
        }  # fmt: skip
        if self.options.tiles:
            from leanmoe.provenance import hardware

            give_tiles(self.options.tiles, self.shape.experts, self.shape.expert_width, hardware())
        llm = LLM(model=str(folder), **settings)
        self.say("engine loaded")
        engine = Engine(llm, self.plans, Replay(self.shape.experts, rows, use))
        if engine.layers != len(self.shape.moe_layers):
            sys.exit(f"{engine.layers} MoE layers were found, not {len(self.shape.moe_layers)}")
        if _has_gpu() and not engine.is_captured:
            sys.exit("this vLLM's captured steps cannot be exchanged: use 0.24.0")
        self.ways = [STOCK, *self.plans]
        for way in self.ways:
            engine.capture(way)
        self.say(f"{len(self.ways)} ways captured")
        stock, empty = (engine.tokens(way, 8, 24) for way in self.ways[:2])
        self.same_tokens = stock == empty
        return engine

    def measure(self, engine: Any) -> None:
        """Rounds until there is no more time; each writes what it has."""
        for number in range(self.options.rounds):
            for routing in self.routings:
                engine.replay.draw(routing, seed=number)
                for load in self.loads:
                    if self.has_time:
                        self._point(engine, routing, load, number)
            if number == 0 and self.has_time:
                self._add_banded(engine)
            is_last = number == self.options.rounds - 1 or not self.has_time
            self.write(is_complete=is_last and self.has_time)
            self.say(f"round {number + 1} written")
            if not self.has_time:
                return

    def _add_banded(self, engine: Any) -> None:
        """Puts the fastest single rule of each load into a plan of its own."""
        from leanmoe.plan import Band, Plan

        bands: list[Band] = []
        for number, load in enumerate(self.loads):
            fastest = min(self.plans, key=lambda way: self._mean_step(load, way))
            up_to = load if number < len(self.loads) - 1 else None
            rules = self.plans[fastest].bands[0].rules
            if bands and bands[-1].rules == rules:
                bands.pop()
            bands.append(Band(up_to, rules))
            self.say(f"fastest at {load}: {fastest}")
        self.plans[BANDED] = Plan(self.shape.fingerprint(), tuple(bands))
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
                took = engine.step_seconds(load, way, self.options.replays)
                self._add(number, routing, load, way, "step_ms", took * 1e3)
            for way in order:
                self._see(engine, routing, load, way)

    def _see(self, engine: Any, routing: str, load: int, way: str) -> None:
        found = engine.replay.experts(way, load, load)
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
                entry["distinct"] = round(sum(d for d, _ in seen) / len(seen), 2)
                entry["activated"] = round(sum(a for _, a in seen) / len(seen), 3)
            found.append(entry)
        return found

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
            "is_complete": is_complete,
            "same_tokens_under_empty_plan": self.same_tokens,
            "provenance": provenance,
            "settings": {n: str(v) for n, v in vars(self.options).items()},
            "config": self.config,
            "plans": {n: p.to_json()["bands"] for n, p in self.plans.items()},
            "lines": self.lines(),
        }
        # One rule says it for all layers here: what is the same in each is not written 48 times.
        for bands in content["plans"].values():
            for band in bands:
                band["rules"] = band["rules"][:1]
        write_json(path, content)
        self.path = path

    def say(self, what: str) -> None:
        print(f"{time.perf_counter() - self.started:6.0f} s  {what}", flush=True)

    def table(self) -> None:
        """The results on screen: captured steps if there are any, then whole engine steps."""
        lines = {(e["routing"], e["requests"], e["plan"]): e for e in self.lines()}
        for name in ("step_ms", "tpot_ms", "tokens_per_second"):
            if not any(name in entry for entry in lines.values()):
                continue
            for routing in self.routings:
                print(f"\n{routing} routing: {name}, gain over stock, distinct experts a layer")
                print(f"{'requests':>8} " + " ".join(f"{way:>18}" for way in self.ways))
                for load in self.loads:
                    cells = [_cell(lines.get((routing, load, way)), name) for way in self.ways]
                    print(f"{load:>8} " + " ".join(f"{cell:>18}" for cell in cells))
        print(f"\nsame tokens as stock under the empty plan: {self.same_tokens}")
        print(self.path)


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


def _cell(entry: dict[str, Any] | None, name: str) -> str:
    if entry is None or name not in entry:
        return "-"
    gain = entry[f"gain_{name}"]["median"]
    return f"{entry[name]['median']:.4g} {gain:.2f}x {entry.get('distinct', 0):.0f}"


def _has_gpu() -> bool:
    import torch

    return bool(torch.cuda.is_available())


def _on_gpu(loads: list[int], shape: str) -> dict[str, Any]:
    """Settings that ran on an H200; MLA models leave attention to vLLM."""
    found: dict[str, Any] = {
        "moe_backend": "triton",
        "compilation_config": {
            "cudagraph_mode": "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": loads,
            "cudagraph_num_of_warmups": 1,
        },
    }
    if shape != "deepseek-v3":
        found["attention_config"] = {"backend": "FLASH_ATTN", "flash_attn_version": 3}
    return found


def main() -> None:
    """Runs it."""
    options = parse()
    os.environ |= {name: value for name, value in ENVIRONMENT.items() if name not in os.environ}
    os.environ.pop("LEANMOE_PLAN", None)
    if options.vllm != "installed":
        sys.path.insert(0, options.vllm)
        os.environ["PYTHONPATH"] = os.pathsep.join(
            [options.vllm, *filter(None, [os.environ.get("PYTHONPATH")])]
        )
    run = Run(options)
    engine = run.load()
    run.measure(engine)
    run.table()


if __name__ == "__main__":
    main()
