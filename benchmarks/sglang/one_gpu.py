"""SGLang under plans on one GPU: does it run, are tokens right, how fast does it decode?

    python -m benchmarks.sglang.one_gpu --seconds 540
    python -m benchmarks.sglang.one_gpu --parts measure --paper 16,64 --rounds 2
    python -m benchmarks.sglang.one_gpu --shape tiny --layers 2 --loads 1,2 --no-captures

One call: `--seconds` is a limit for all of it, and each engine is a group of processes that is
ended when its own time is over. First small drawn models answer under plans (check), all at once.
Then one engine with dummy weights and replayed routing is loaded, as for vLLM (vllm.one_gpu): its
decode steps are captured for stock and for each plan, which take turns in each round. Two times are
taken: that of the captured step alone, and that between two steps of the whole engine. Prompts run
eagerly. Written as it goes.

Where SGLang is packed in two archives, and leanmoe is a checkout:

    mkdir -p $SGL && for each in sglang-*.tar.xz; do tar xJf $each -C $SGL; done
    export PYTHONPATH=$SGL SGLANG_JIT_CACHE_DIR=$SGL/jit OUT=results
    python3 warm_jit.py && python3 -m benchmarks.sglang.one_gpu --seconds 500

The processes find leanmoe by an entry point that is made for them; nothing need be installed.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import mkdtemp
from typing import Any

from benchmarks.common.results import collect, file_of, parser_of, write
from benchmarks.sglang.settings import PACKED, SIZES, engine_settings, let_plugins_be_found
from benchmarks.vllm.shapes import SHAPES, config_of, what_it_is
from benchmarks.vllm.step_results import interval
from benchmarks.vllm.variants import rule_of
from leanmoe.core.environment import PLAN
from leanmoe.models.shape import read_shape
from leanmoe.plan import Band, Fingerprint, Plan

PLANS = (
    "k=6: top_k=6; k=4: top_k=4; guaranteed=3: guaranteed=3; guaranteed=4: guaranteed=4; "
    "budget: budget=3/8; banded: 8 top_k=4 | 32 guaranteed=4 | guaranteed=3"
)
STOCK, EMPTY = "stock", "empty plan"
TIMES = ("step_ms", "engine_ms", "tokens_per_second")
SECONDS_TO_END = 15
CHECK_SHARE = 0.4
"""Of the time, for the checks at most."""


def main() -> None:
    """Runs it."""
    options = _options()
    run = Run(options, Path(mkdtemp()))
    if "check" in options.parts:
        run.check()
    if "measure" in options.parts:
        run.measure()
    path = run.write()
    run.show()
    print(path)


def _options() -> Any:
    parser = parser_of(__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-30b-a3b")
    parser.add_argument("--layers", type=int, help="decoder layers, in place of the shape's own")
    parser.add_argument("--loads", type=_numbers, default=SIZES, help="requests at once")
    parser.add_argument("--prompts", type=_numbers, default=(2048, 8192), help="tokens of a prompt")
    parser.add_argument(
        "--paper", type=_numbers, default=(), help="requests, 1,024 tokens in and out"
    )
    parser.add_argument("--plans", default=PLANS, help="name: [rows] field=value ... | ...; ...")
    parser.add_argument("--routings", type=_words, default=("skewed", "uniform"))
    parser.add_argument("--parts", type=_words, default=("check", "measure"))
    parser.add_argument("--rounds", type=int, default=5, help="at most")
    parser.add_argument("--steps", type=int, default=24, help="decode steps a measurement")
    parser.add_argument("--replays", type=int, default=10, help="captured steps a measurement")
    parser.add_argument("--seconds", type=float, default=540, help="for all of it")
    parser.add_argument("--memory", type=float, default=0.8, help="share of the GPU's for SGLang")
    parser.add_argument("--no-captures", dest="captures", action="store_false")
    return parser.parse_args()


def _words(text: str) -> tuple[str, ...]:
    return tuple(word for word in text.split(",") if word)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in _words(text))


def plans_of(model: Fingerprint, text: str) -> dict[str, Plan]:
    """Stock's and the empty plan, and those of "name: field=value; name: 8 field=value | ..."."""
    found = {STOCK: Plan(model), EMPTY: Plan.uniform(model, rule_of("", model.experts))}
    for part in text.split(";"):
        name, _, described = part.partition(":")
        bands = []
        for band in described.split("|"):
            words = band.split()
            up_to = int(words.pop(0)) if words and words[0].isdigit() else None
            rule = rule_of(" ".join(words), model.experts)
            bands.append(Band(up_to, (rule,) * model.moe_layers))
        found[name.strip()] = Plan.banded(model, tuple(bands))
        found[name.strip()].check(model)
    return found


@dataclass(frozen=True)
class Ended:
    """What became of one engine's processes."""

    answer: dict[str, Any]
    said: list[str]
    """What leanmoe logged."""
    failure: str | None


class Run:
    """One call: its time, its folder, and what it found."""

    def __init__(self, options: Any, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.until = time.monotonic() + options.seconds
        self.environment = let_plugins_be_found(folder / "plugins")
        self.found: dict[str, Any] = {}
        self.made = collect(0)

    def check(self) -> None:
        """Eight small engines at once; their tokens are compared."""
        from benchmarks.sglang import check

        models = check.draw_models(self.folder)
        limit = time.monotonic() + CHECK_SHARE * self.options.seconds
        started = []
        for place, each in enumerate(check.engines(models[False])):
            request = check.request(each, models, place)
            started.append(
                (each, self._start(each.name, request, check.environment(each, self.folder)))
            )
        ended = {each.name: child.wait(limit) for each, child in started}
        answers = {name: each.answer for name, each in ended.items()}
        self.found["check"] = check.verdicts(answers)
        self.found["said"] = {name: each.said for name, each in ended.items()}
        self.found["failures"] = {n: e.failure for n, e in ended.items() if e.failure}
        self.write()

    def measure(self) -> None:
        """One engine with dummy weights under all plans."""
        options, model = self.options, self.folder / "measured"
        config = config_of(options.shape, options.layers)
        model.mkdir()
        (model / "config.json").write_text(json.dumps(config))
        shape = read_shape(str(model)).fingerprint()
        plans = plans_of(shape, options.plans)
        for number, plan in enumerate(plans.values()):
            plan.save(model / f"plan-{number}.json")
        names = {name: f"plan-{number}.json" for number, name in enumerate(plans)}
        (model / "names.json").write_text(json.dumps(names))
        longest = max((*options.prompts, *(2048 for _ in options.paper), 128))
        settings = engine_settings(
            model, 20, load_format="dummy", cuda_graph_bs_decode=sorted({*options.loads, 8}),
            max_running_requests=max(*options.loads, 8, *options.paper),
            context_length=longest + 64, chunked_prefill_size=8192,
            mem_fraction_static=options.memory,
        )  # fmt: skip
        if not options.captures:
            settings["disable_cuda_graph"] = True
        rules = {n: [r for band in plan.bands for r in band.rules] for n, plan in plans.items()}
        aware = [name for name, of_plan in rules.items() if any(r.is_batch_aware for r in of_plan)]
        request = {
            "do": "times", "settings": settings, "loads": options.loads, "variants": list(plans),
            "prompts": options.prompts, "paper": options.paper, "routings": options.routings,
            "rounds": options.rounds, "steps": options.steps, "replays": options.replays,
            "prompt": 16, "vocabulary": config["vocab_size"], "is_captured": options.captures,
            "batch_aware": aware if options.captures else [],
            "until": time.time() + self.until - time.monotonic() - SECONDS_TO_END,
        }  # fmt: skip
        variants = {"LEANMOE_BENCH_VARIANTS": str(model)}
        ended = self._start("measured", request, variants).wait(self.until)
        self.found |= {"measured": ended.answer, "shape": what_it_is(
            options.shape, config["num_hidden_layers"]
        )}  # fmt: skip
        self.found.setdefault("said", {})["measured"] = ended.said
        if ended.failure:
            self.found.setdefault("failures", {})["measured"] = ended.failure

    def write(self) -> Path:
        """All that was found, as one file."""
        measured = self.found.get("measured", {})
        decode, plans = measured.get("decode", []), measured.get("plans", [])
        content = {
            "engine": {"sglang": _version("sglang"), "kernels": _version("sglang-kernel")},
            "note": PACKED, "is_complete": bool(measured.get("is_complete")), **self.found,
            "lines": lines(decode, plans),
            "prefill": prefill_lines(measured.get("prefill", [])),
        }  # fmt: skip
        name = f"sglang-{self.options.shape}"
        path = file_of(self.options.output, name, self.made)
        return write(path, self.made, "measured", content)

    def show(self) -> None:
        """Verdicts, then tables."""
        for each in self.found.get("check", []):
            print(json.dumps(each))
        for name, said in self.found.get("said", {}).items():
            print(name, *(line for line in said if "at work" in line), sep="\n  ")
        for each in self.found.get("measured", {}).get("padding", []):
            print("padding", json.dumps(each))
        measured = self.found.get("measured", {})
        show(lines(measured.get("decode", []), measured.get("plans", [])))
        for each in prefill_lines(self.found.get("measured", {}).get("prefill", [])):
            print(json.dumps(each))
        for each in self.found.get("measured", {}).get("paper", []):
            print(json.dumps(each))
        for name, failure in self.found.get("failures", {}).items():
            print(f"FAILED {name}: {failure}")

    def _start(self, name: str, request: dict[str, Any], more: dict[str, str]) -> Child:
        return Child(self.folder, name, request, self.environment | more)


class Child:
    """One engine's group of processes."""

    def __init__(
        self, folder: Path, name: str, request: dict[str, Any], more: dict[str, str]
    ) -> None:
        self._folder = folder / f"engine {name}"
        self._folder.mkdir()
        (self._folder / "request.json").write_text(json.dumps(request))
        self._log = (self._folder / "log").open("w", encoding="utf-8")
        environment = {key: value for key, value in os.environ.items() if key != PLAN} | more
        program = [sys.executable, "-m", "benchmarks.sglang.engine_process"]
        self._process = subprocess.Popen(
            [*program, "request.json", "answer.json"],
            cwd=self._folder, env=environment, stdout=self._log, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip

    def wait(self, until: float) -> Ended:
        """What it answered until then; its processes are ended."""
        failure = None
        try:
            code = self._process.wait(max(0.1, until - time.monotonic()))
            failure = None if code == 0 else f"exit code {code}: {self._last_words()}"
        except subprocess.TimeoutExpired:
            failure = f"its time was over: {self._last_words()}"
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        path = self._folder / "answer.json"
        answer = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        said = [line.partition("leanmoe: ")[2] for line in self._logged() if "leanmoe: " in line]
        return Ended(answer, said, failure)

    def _logged(self) -> list[str]:
        log = self._folder / "log"
        return log.read_text(encoding="utf-8", errors="replace").splitlines()

    def _last_words(self) -> str:
        words = self._logged()
        errors = [line for line in words if "rror" in line]
        return " / ".join([*errors[-6:], *words[-3:]])[-1500:]


def _version(name: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return None


def lines(points: Sequence[dict[str, Any]], plans: Sequence[str]) -> list[dict[str, Any]]:
    """One entry for each routing, load and plan, in the order of `plans`.

    Medians with intervals; gains are paired by round.
    """
    by_key: dict[tuple[str, int, str], dict[int, dict[str, Any]]] = {}
    for point in points:
        key = (point["routing"], point["requests"], point["plan"])
        by_key.setdefault(key, {})[point["round"]] = point
    routings = list(dict.fromkeys(point["routing"] for point in points))

    def place(key: tuple[str, int, str]) -> tuple[int, int, int]:
        return routings.index(key[0]), key[1], plans.index(key[2])

    found = []
    for (routing, requests, plan), rounds in sorted(
        by_key.items(), key=lambda each: place(each[0])
    ):
        stock = by_key.get((routing, requests, STOCK), {})
        entry: dict[str, Any] = {"routing": routing, "requests": requests, "plan": plan}
        for name in (*TIMES, "distinct", "activated"):
            values = [point[name] for point in rounds.values() if name in point]
            if not values:
                continue
            entry[name] = interval(values) if name in TIMES else round(median(values), 3)
            pairs = [(stock[n][name], p[name]) for n, p in rounds.items() if n in stock]
            if name in TIMES and pairs:
                is_rate = name == "tokens_per_second"
                entry[f"gain_{name}"] = interval([b / a if is_rate else a / b for a, b in pairs])
        found.append(entry)
    return found


def prefill_lines(points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry for each prompt and plan; the first round is left out, since it compiles."""
    kept = [point for point in points if point["round"] > 0]
    by_key: dict[tuple[int, str], list[float]] = {}
    for point in kept:
        by_key.setdefault((point["tokens"], point["plan"]), []).append(point["prompt_ms"])
    return [
        {
            "tokens": tokens, "plan": plan, "prompt_ms": interval(values),
            "gain": round(median(by_key[tokens, STOCK]) / median(values), 4),
        }
        for (tokens, plan), values in by_key.items()
    ]  # fmt: skip


def show(entries: Sequence[dict[str, Any]]) -> None:
    """A table for each time and routing: loads down, plans across."""
    by_key = {(e["routing"], e["requests"], e["plan"]): e for e in entries}
    routings, loads, plans = (list(dict.fromkeys(key[i] for key in by_key)) for i in range(3))
    for name in TIMES:
        for routing in routings:
            print(f"\n{routing} routing: {name}, gain over stock, distinct experts a layer")
            print(f"{'requests':>8} " + " ".join(f"{plan:>20}" for plan in plans))
            for load in loads:
                cells = [_cell(by_key.get((routing, load, plan)), name) for plan in plans]
                print(f"{load:>8} " + " ".join(f"{cell:>20}" for cell in cells))


def _cell(entry: dict[str, Any] | None, name: str) -> str:
    if entry is None or f"gain_{name}" not in entry:
        return "-"
    gain = entry[f"gain_{name}"]["median"]
    return f"{entry[name]['median']:.4g} {gain:.2f}x {entry.get('distinct', 0):.0f}"


if __name__ == "__main__":
    main()
