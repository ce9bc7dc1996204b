"""`leanmoe bench`: checks what was asked, sets the right engine up, sweeps, writes results.json."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leanmoe.bench.prompts import Supply, encode, read_dataset, read_stream
from leanmoe.bench.record import Record
from leanmoe.bench.servers import Server, ask, is_server, read_address
from leanmoe.bench.settings import ENGINES, BenchSettings, ServiceLoad
from leanmoe.bench.sweep import Runner, sweep
from leanmoe.core.errors import LeanMoeError
from leanmoe.core.provenance import collect
from leanmoe.core.quiet import quiet_transformers
from leanmoe.models.reference import folder_of
from leanmoe.models.shape import read_shape
from leanmoe.plan import Plan

RESULTS = "results.json"
BUSY_SHARE = 0.75
"""Of the cores, as load average over a minute. Loading the model itself makes about half of one."""
SMALLEST_VOCABULARY_SAMPLE = "leanmoe"


@dataclass(frozen=True)
class Job:
    """What to measure, and where to write it."""

    targets: tuple[str, ...]
    """One model, or the addresses of servers."""
    plans: tuple[Path, ...]
    settings: BenchSettings
    output: Path
    command: str
    engine: str = ENGINES[0]
    tokenizer: str | None = None
    served_model: str | None = None
    allow_remote: bool = False
    gpus: int | None = None
    with_stock: bool = False
    dtype: str | None = None
    trust_remote_code: bool = False
    overwrite: bool = False
    engine_args: str | None = None
    """JSON of arguments for vLLM's engine."""

    @property
    def over_http(self) -> bool:
        """Whether the targets are servers."""
        return any(is_server(target) for target in self.targets)

    def check(self) -> None:
        """Raises LeanMoeError for settings that exclude each other, before anything is loaded."""
        self.settings.check()
        if self.engine not in ENGINES:
            raise LeanMoeError(f"--engine is {self.engine!r}: it must be {' or '.join(ENGINES)}")
        if self.over_http:
            self._check_servers()
        else:
            self._check_model()
        if self.gpus is not None and not 1 <= self.gpus <= 10_000:
            raise LeanMoeError(f"--gpus is {self.gpus}: it must be 1 to 10,000")
        results = self.output / RESULTS
        if results.exists() and not self.overwrite:
            raise LeanMoeError(f"{results} exists: choose another --output, or add --overwrite")

    def _check_servers(self) -> None:
        for target in self.targets:
            if not is_server(target):
                raise LeanMoeError(f"{target} stands among addresses: give servers or one model")
        if self.plans:
            raise LeanMoeError(
                "--plan is for a model in this process: a server has its plan already; start one "
                "with the plan and one without, and give both addresses"
            )
        if self.engine != ENGINES[0]:
            raise LeanMoeError(f"--engine {self.engine} runs a model here: a server has its own")

    def _check_model(self) -> None:
        if len(self.targets) != 1:
            raise LeanMoeError(
                f"{len(self.targets)} models were given ({', '.join(self.targets)}): one at a "
                "time, or several addresses of servers"
            )
        if self.served_model or self.allow_remote:
            raise LeanMoeError("--served-model and --allow-remote are for the address of a server")
        if read_engine_args(self.engine_args) and self.engine != "vllm":
            raise LeanMoeError("--engine-args are for --engine vllm")
        if self.engine == "vllm" and self.settings.request_rate:
            raise LeanMoeError(
                "--request-rate with --engine vllm: the offline engine is measured as a closed "
                "loop; start a server and give its address"
            )


Shown = Callable[[Record, ServiceLoad], None]
Closed = Callable[[Path], object]


def run_job(job: Job, shown: Shown, closed: Closed) -> Record:
    """Measures; `shown` is called after each load, `closed` when results.json stands.

    The file is whole after every run, and `closed` is called however the sweep ended.

    Raises LeanMoeError for bad input before anything is measured, and for whatever ends the sweep
    early; what was measured until then stays in the file, marked incomplete.
    """
    job.check()
    if job.over_http:
        runner, supply, source = _http(job)
    elif job.engine == "vllm":
        runner, supply, source = _vllm(job)
    else:
        runner, supply, source = _in_process(job)
    record = open_record(job, runner.variants(), runner.describe(), source)
    record.notes += busy_machine()
    record.save()
    try:
        sweep(runner, supply, job.settings, record, lambda load: shown(record, load))
    except LeanMoeError as error:
        kept = "nothing was measured:" if record.is_empty else "what was measured is in"
        raise LeanMoeError(f"{error}; {kept} {record.path}, marked incomplete") from error
    finally:
        closed(record.path)
    return record


def read_engine_args(text: str | None) -> dict[str, Any]:
    """The arguments in --engine-args. Raises LeanMoeError unless they are a JSON object."""
    try:
        found = json.loads(text or "{}")
    except json.JSONDecodeError:
        found = None
    if not isinstance(found, dict):
        raise LeanMoeError(
            f'--engine-args is {text!r}: it must be a JSON object like {{"enforce_eager": true}}'
        )
    return found


def busy_machine() -> list[str]:
    """A note where other work keeps this machine's cores busy before the bench begins."""
    cores = os.cpu_count() or 1
    load = os.getloadavg()[0]
    if load < BUSY_SHARE * cores:
        return []
    return [
        f"The machine was busy when this began: load average {load:.1f} on {cores} cores. "
        "Times are longer and intervals wider than on an idle one."
    ]


def open_record(
    job: Job,
    variants: Sequence[Mapping[str, Any]],
    described: Mapping[str, Any],
    source: str,
) -> Record:
    """An empty record that says what is about to run."""
    about = {
        "provenance": collect(job.command, job.settings.seed).to_json(),
        **described,
        "text": job.settings.dataset_path or source,
    }
    return Record(job.output / RESULTS, job.settings, variants, about)


def _in_process(job: Job) -> tuple[Runner, Supply, str]:
    plans = read_plans(job.plans)
    check_plans(plans, job.targets[0])
    from leanmoe.bench.in_process import InProcess
    from leanmoe.runtime import load_model

    quiet_transformers()
    model, tokenizer = load_model(job.targets[0], job.dtype, job.trust_remote_code)
    source, supply = make_supply(job.settings, tokenizer)
    runner = InProcess(model, job.targets[0], plans, job.settings, supply, job.with_stock)
    return runner, supply, source


def _http(job: Job) -> tuple[Runner, Supply, str]:
    servers = [
        ask(read_address(target, job.allow_remote), job.served_model) for target in job.targets
    ]
    names = [server.name for server in servers]
    if twice := [name for name in names if names.count(name) > 1]:
        raise LeanMoeError(
            f"{twice[0]} was given twice: name servers apart, like full=URL plan=URL"
        )
    tokenizer = load_tokenizer(job, servers)
    from leanmoe.bench.over_http import OverHTTP

    source, supply = make_supply(job.settings, tokenizer)
    for server in servers:
        if server.max_tokens is not None and supply.longest > server.max_tokens:
            raise LeanMoeError(
                f"prompt and reply have up to {supply.longest:,} tokens: {server.name} takes at "
                f"most {server.max_tokens:,}; set --input-len and --output-len"
            )
    return OverHTTP(servers, tokenizer, job.settings, supply, job.gpus), supply, source


def _vllm(job: Job) -> tuple[Runner, Supply, str]:
    plans = read_plans(job.plans)
    check_plans(plans, job.targets[0])
    from leanmoe.bench.vllm_offline import VLLMOffline
    from leanmoe.core.installed_vllm import require_vllm

    require_vllm(bool(plans))
    tokenizer = load_tokenizer(job, [])
    source, supply = make_supply(job.settings, tokenizer)
    files = dict(zip(plans, job.plans, strict=True))
    runner = VLLMOffline(
        job.targets[0],
        files,
        job.settings,
        supply,
        job.gpus or 1,
        job.dtype,
        job.trust_remote_code,
        read_engine_args(job.engine_args),
    )
    return runner, supply, source


def read_plans(paths: Sequence[Path]) -> dict[str, Plan]:
    """The plans by their files' names. Raises LeanMoeError for a name that stands twice."""
    found: dict[str, Plan] = {}
    for path in paths:
        name = path.stem
        if name in found or name == "full":
            raise LeanMoeError(f"plan {path}: another variant is called {name}; rename the file")
        found[name] = Plan.load(path)
    return found


def check_plans(plans: Mapping[str, Plan], model: str) -> None:
    """Refuses a plan of another model from its config.json alone, before weights are read."""
    fingerprint = read_shape(model).fingerprint()
    for name, plan in plans.items():
        try:
            plan.check(fingerprint)
        except LeanMoeError as error:
            raise LeanMoeError(f"plan {name}: {error}") from error


def make_supply(settings: BenchSettings, tokenizer: Any) -> tuple[str, Supply]:
    """Where prompts come from, and what draws them."""
    rows = read_dataset(Path(settings.dataset_path), tokenizer) if settings.dataset_path else []
    source, stream = read_stream(settings.text, tokenizer)
    return source, Supply(stream, settings.input_len, settings.output_len, rows, settings.seed)


def load_tokenizer(job: Job, servers: Sequence[Server]) -> Any:
    """The tokenizer that cuts prompts to length: of --tokenizer, or of what is served."""
    from transformers import AutoTokenizer

    quiet_transformers()
    guesses = [job.tokenizer] if job.tokenizer else _guesses(job, servers)
    for guess in guesses:
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                folder_of(guess), trust_remote_code=job.trust_remote_code
            )
            encode(tokenizer, SMALLEST_VOCABULARY_SAMPLE)
        except Exception:  # the hub, tokenizers and Transformers each raise their own
            continue
        return tokenizer
    tried = ", ".join(guesses) or "nothing to try"
    raise LeanMoeError(
        f"no tokenizer was found ({tried}): give a folder, a hub name or 'reference' with "
        "--tokenizer; prompts are cut to length with it"
    )


def _guesses(job: Job, servers: Sequence[Server]) -> list[str]:
    if not servers:
        return [job.targets[0]]
    first = servers[0]
    return [guess for guess in (first.root, first.model) if guess and Path(guess).is_dir()]
