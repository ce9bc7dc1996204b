"""What leanmoe does with a file of each kind, and what a result of it must be like."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from lm_eval import tasks

from leanmoe.bench.guidellm_client import TimedCompletions
from leanmoe.bench.measurement import Measurement
from leanmoe.bench.over_http import _reason, timeline_of
from leanmoe.bench.prompts import read_dataset
from leanmoe.bench.server_routing import read_step
from leanmoe.bench.servers import MOST_OF_A_REASON, Server, ask, reason_in
from leanmoe.cli.inspect import inspect
from leanmoe.core.errors import LeanMoeError
from leanmoe.core.options import read_config
from leanmoe.core.text import read_corpus
from leanmoe.eval.harness_tasks import askable_tasks, require_harness
from leanmoe.eval.prompts import read_prompts
from leanmoe.eval.settings import EvalSettings
from leanmoe.models.settings import InspectSettings
from leanmoe.models.shape import MoEShape, read_shape
from leanmoe.plan import Plan, Rule
from leanmoe.plan.named_plans import Named, parse_rule
from leanmoe.predict.run import predict
from leanmoe.predict.settings import PredictSettings
from leanmoe.predict.traffic.service_load import read_lengths
from leanmoe.report.write import page_of, read_any
from leanmoe.results.prune import PruneReport
from leanmoe.serve.export import ENGINES, export
from leanmoe.serve.plugin_options import PROMPT
from tests.fuzz import seeds
from tests.fuzz.mutations import Seeds
from tests.report.example import plan as tuned_plan

Read = Callable[[bytes, Path], object]
"""Reads the content of a file, by way of an empty folder; asserts that what comes of it is sane."""
OFTEN, SELDOM = 2, 20
"""One of so many inputs takes part in what is slow."""


def takes_part(content: bytes, one_of: int) -> bool:
    """Whether an input is one of those: decided by the input alone."""
    return sum(content) % one_of == 0


def sane(value: Any, where: str = "") -> None:
    """Asserts that no number of a result is negative, infinite or none at all."""
    if isinstance(value, Mapping):
        for key, each in value.items():
            sane(each, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for each in value:
            sane(each, where)
    elif isinstance(value, int | float):
        assert 0 <= value < math.inf, f"{where} is {value}"


def read_model(content: bytes, folder: Path) -> object:
    """A config.json, as inspect, predict and export read it."""
    (folder / "config.json").write_bytes(content)
    return _inspected(content, folder)


def read_header(content: bytes, folder: Path) -> object:
    """The header of a shard beside a small model's config.json."""
    config = next(each for each in seeds.configs().values if each.get("model_type") == "olmoe")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(len(content).to_bytes(8, "little") + content)
    return _inspected(content, folder)


def _inspected(content: bytes, folder: Path) -> object:
    shape = read_shape(str(folder))
    assert 1 <= shape.top_k <= shape.experts, f"{shape.top_k} of {shape.experts} experts"
    assert shape.routed_layers <= shape.layers, f"{shape.routed_layers} of {shape.layers} layers"
    total, active = shape.total_parameters(), shape.active_parameters()
    assert 0 < active <= total, f"{active} of {total} parameters are active"
    assert shape.expert_bytes > 0, "experts have no bytes"
    as_json = _printed(lambda: inspect(InspectSettings(str(folder)), as_json=True))
    facts = json.loads(as_json, parse_constant=_no_number)
    sane({**facts, "router": {}})
    if takes_part(content, SELDOM):
        page = _printed(lambda: inspect(InspectSettings(str(folder), bandwidth=4800.0)))
        assert not re.search(r"\b(nan|inf)\b", page), "nan or inf is shown"
    if shape.not_runnable is None:
        _planned(content, folder, shape)
    return shape


def _planned(content: bytes, folder: Path, shape: MoEShape) -> None:
    """What a plan for the model does: it is written, read, exported and predicted."""
    if len(shape.moe_layers) > 200:
        return
    fewer = max(1, shape.top_k // 2)
    plan = Plan.uniform(shape.fingerprint(), Rule(top_k=fewer))
    plan.check(shape.fingerprint())
    export(plan, folder / "plan.json", "vllm", str(folder))
    if takes_part(content, SELDOM):
        _predicted(PredictSettings(str(folder), concurrency=(4,), top_k=fewer))


def _predicted(settings: PredictSettings) -> None:
    short = {"input_len": "16", "output_len": "4"}
    results = predict(PredictSettings(**{**vars(settings), **short}))
    for each in results.predictions:
        variants = [asdict(v) for v in (each.full, each.plan) if v is not None]
        sane([{k: v for k, v in found.items() if k != "bounds"} for found in variants])
        assert each.full.output_throughput > 0, "no throughput"
        assert 0 < each.full.distinct <= 1e9, f"{each.full.distinct} distinct experts"


def _printed(show: Callable[[], object]) -> str:
    out = io.StringIO()
    with redirect_stdout(out), redirect_stderr(io.StringIO()):
        show()
    out.getvalue().encode()
    return out.getvalue()


def _no_number(word: str) -> float:
    raise AssertionError(f"JSON with {word}")


def read_plan(content: bytes, folder: Path) -> object:
    """A plan: for the reference model it is exported, applied and predicted, too."""
    path = folder / "plan.json"
    path.write_bytes(content)
    plan = Plan.load(path)
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    assert Named("plan", plan).digest
    plan.check(seeds.reference().fingerprint(), more_experts=True)
    for tokens in (1, 64):
        assert len(plan.rules_for(tokens)) == plan.model.moe_layers
    for engine in ENGINES:
        for drop in () if engine == "transformers" else ((), (PROMPT,)):
            try:
                json.dumps(export(plan, path, engine, "reference", drop).to_json())
            except LeanMoeError as error:
                one_line(error)
    if takes_part(content, OFTEN):
        _applied(plan)
    if takes_part(content, SELDOM):
        _predicted(PredictSettings("reference", plan=path, concurrency=(4,)))
    return plan


@cache
def reference_model() -> tuple[Any, Any]:
    """The reference model and its tokenizer."""
    from leanmoe.runtime.model import load_model

    return load_model("reference")


def _applied(plan: Plan) -> None:
    import torch

    import leanmoe

    model, _ = reference_model()
    with torch.no_grad(), leanmoe.apply(model, plan, count=True):
        logits = model(torch.arange(6)[None]).logits
    assert bool(torch.isfinite(logits).all()), "logits are not finite"


def read_results(content: bytes, folder: Path) -> object:
    """A results file, and its page."""
    (folder / "results.json").write_bytes(content)
    (folder / "plan.json").write_text(json.dumps(tuned_plan()))
    if b"leanmoe_prune" in content:
        return PruneReport.load(folder / "results.json")
    results = read_any(folder)
    if takes_part(content, OFTEN):
        page_of(results, folder).encode()
    return results


def read_rows(content: bytes, folder: Path) -> object:
    """JSON lines as a text, as a dataset and as prompts; an array where lines are expected too."""
    path = folder / "rows.jsonl"
    path.write_bytes(content)
    tokenizer = _Letters()
    encoder = SimpleNamespace(start_id=1, context=4096, encode=tokenizer.encode)
    kinds: list[Callable[[], object]] = [
        lambda: _corpus(path),
        lambda: [_counted(row.output_tokens) for row in read_dataset(path, tokenizer)],
        lambda: [each.is_right("4") for each in read_prompts(path, encoder, 4)],  # type: ignore[arg-type]
    ]
    return _any_of(kinds)


def read_prose(content: bytes, folder: Path) -> object:
    """A text under several names, and a file of lengths."""
    paths = [folder / name for name in ("text.txt", "text.md", "text", "text.json")]
    for path in paths:
        path.write_bytes(content)
    kinds: list[Callable[[], object]] = [partial(_corpus, path) for path in paths]
    kinds.append(lambda: [_counted(n) for n in read_lengths(str(paths[0]), "--input-len").values])
    return _any_of(kinds)


def _corpus(path: Path) -> object:
    corpus = read_corpus(str(path))
    assert corpus.documents
    assert all(document.text.strip() for document in corpus.documents)
    "".join(document.text for document in corpus.documents).encode()
    return corpus


def _counted(tokens: int) -> int:
    assert 0 < tokens < 10**9
    return tokens


def _any_of(kinds: list[Callable[[], object]]) -> object:
    """What the first of them gives that reads it; the last error where none does."""
    results, last = [], LeanMoeError("nothing was read")
    for each in kinds:
        try:
            results.append(each())
        except LeanMoeError as error:
            one_line(error)
            last = error
    if not results:
        raise last
    return results


class _Letters:
    """A tokenizer whose tokens are letters."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": self.encode(text)}

    def encode(self, text: str, **_: Any) -> list[int]:
        """One id for each letter."""
        return list(text.encode())


def read_task(content: bytes, folder: Path) -> object:
    """A task file of eval's and its data, up to where a model would be asked."""
    rows = [{"question": f"{n}?", "choices": ["a", "b"], "gold": n % 2} for n in range(4)]
    data = folder / "things.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    content = content.replace(b"FOLDER", str(folder).encode())
    (folder / "things.yaml").write_bytes(content)
    settings = EvalSettings("reference", tasks=("things",), include_path=str(folder))
    manager = partial(tasks.TaskManager, include_defaults=False)
    with (
        redirect_stderr(io.StringIO()),
        redirect_stdout(io.StringIO()),
        pytest.MonkeyPatch.context() as patch,
    ):
        # The harness's own tasks are left out: their index takes seconds.
        patch.setattr(
            tasks, "TaskManager", lambda include_path, **_: manager(include_path=include_path)
        )
        patch.chdir(folder)  # where names of data files that are patterns are looked for
        settings.check()
        require_harness(settings)
        return askable_tasks(settings)


def read_models(content: bytes, _folder: Path) -> object:
    """A server's answer at /v1/models, and what it says of an error."""
    assert len(reason_in(content.decode(errors="replace"))) <= MOST_OF_A_REASON
    return ask_with(content)


def ask_with(content: bytes, status: int = 200) -> Server:
    """`ask` of a server that answers this: no socket, for a client takes 20 ms to be made."""

    def answer(url: str, **_: Any) -> httpx.Response:
        return httpx.Response(status, content=content, request=httpx.Request("GET", url))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(httpx, "get", answer)
        server = ask(Server("one", "http://127.0.0.1:8000"))
    assert server.max_tokens is None or server.max_tokens > 0, f"{server.max_tokens} tokens"
    server.model.encode()
    return server


def read_stream(content: bytes, _folder: Path) -> object:
    """The pieces of a server's stream; GuideLLM makes an error a failed request with a reason."""
    client, request = TimedCompletions(), _Asked()
    try:
        for line in content.decode(errors="replace").split("\n"):
            client.add_streaming_line(f"data: {line}")
        metrics = client.compile_streaming(request, request).response_metrics
    except Exception as error:  # as GuideLLM's worker does it
        raise LeanMoeError(_reason(repr(error))) from error
    timings = SimpleNamespace(request_start=1.0, targeted_start=None)
    seen = SimpleNamespace(
        response_metrics=metrics, info=SimpleNamespace(timings=timings), prompt_tokens=9
    )
    timeline = timeline_of(seen)
    measured = Measurement.of([] if timeline is None else [timeline]).to_vllm_json()
    sane(measured)
    assert measured["output_throughput"] > 0, "no throughput"
    return measured


class _Asked:
    """A request for eight tokens, as far as GuideLLM's handler asks of it."""

    request_id = "1"
    output_metrics = SimpleNamespace(text_tokens=8)

    def model_dump_json(self) -> str:
        """The request's arguments."""
        return "{}"


def read_metrics(content: bytes, _folder: Path) -> object:
    """What a server shows at /metrics."""
    step = read_step(content.decode(errors="replace"))
    if step is not None:
        sane(asdict(step))
    return step


def read_hardware(content: bytes, folder: Path) -> object:
    """A GPU's description, predicted with."""
    path = folder / "gpu.json"
    path.write_bytes(content)
    _predicted(PredictSettings("reference", gpu=str(path), concurrency=(4,)))
    return path


def read_constants(content: bytes, folder: Path) -> object:
    """A file of constants, predicted with."""
    path = folder / "constants.json"
    path.write_bytes(content)
    _predicted(PredictSettings("reference", constants=path, concurrency=(4,)))
    return path


def read_profile(content: bytes, folder: Path) -> object:
    """A profile.json, predicted with."""
    (folder / "profile.json").write_bytes(content)
    _predicted(PredictSettings("reference", profile=folder, concurrency=(4,), top_k=2))
    return folder


def read_settings(content: bytes, folder: Path) -> object:
    """A file of options, as --config names it."""
    path = folder / "settings.toml"
    path.write_bytes(content)
    return read_config(path, ("concurrency", "input_len", "skew", "top_k", "sweep"))


def read_rule(content: bytes, _folder: Path) -> object:
    """A rule in words, as --rule has it."""
    rule = parse_rule(content.decode(errors="replace"))
    model = seeds.reference().fingerprint()
    Plan.uniform(model, rule).check(model)
    return rule


def one_line(error: LeanMoeError) -> None:
    """Asserts that a refusal is a line that can be printed and read."""
    words = str(error)
    assert words.strip(), "a refusal without words"
    assert len(words.splitlines()) == 1, f"a refusal of several lines: {words[:300]!r}"
    assert len(words) < MOST_LETTERS, f"a refusal of {len(words)} letters: {words[:300]!r}"
    words.encode()


MOST_LETTERS = 3000
"""Of a refusal; the longest lists every family."""
KINDS: Mapping[str, tuple[Callable[[], Seeds], Read, int]] = {
    "model configs": (seeds.configs, read_model, 30),
    "shard headers": (lambda: seeds.HEADER, read_header, 6),
    "plans": (seeds.plans, read_plan, 12),
    "results files": (seeds.results, read_results, 12),
    "task files": (lambda: seeds.TASKS, read_task, 2),
    "JSON lines": (lambda: seeds.ROWS, read_rows, 8),
    "texts": (lambda: seeds.PROSE, read_prose, 6),
    "lists of models": (lambda: seeds.MODELS_LISTED, read_models, 5),
    "streams": (lambda: seeds.STREAMS, read_stream, 6),
    "metrics": (lambda: seeds.METRICS, read_metrics, 3),
    "hardware": (lambda: seeds.HARDWARE, read_hardware, 2),
    "constants": (seeds.constants, read_constants, 2),
    "profiles": (seeds.profiles, read_profile, 2),
    "settings files": (lambda: seeds.SETTINGS, read_settings, 2),
    "rules in words": (lambda: seeds.RULES, read_rule, 2),
}
"""Seeds, reader and share of the inputs in percent."""
