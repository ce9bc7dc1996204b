"""`leanmoe bench`: checks what was asked, sets the right engine up, sweeps, writes results.json."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from leanmoe.bench.prompts import Supply, encode, read_dataset, read_stream
from leanmoe.bench.servers import Server, ask, read_address
from leanmoe.bench.settings import BenchSettings, ServiceLoad
from leanmoe.bench.sweep import Record, Runner, sweep
from leanmoe.core.errors import LeanMoeError
from leanmoe.core.provenance import collect
from leanmoe.core.quiet import quiet_transformers
from leanmoe.models.reference import folder_of
from leanmoe.models.shape import read_shape
from leanmoe.plan.named_plans import Named, read_plans
from leanmoe.results.bench import BenchResults

RESULTS = "results.json"
SMALLEST_VOCABULARY_SAMPLE = "leanmoe"


def bench(
    settings: BenchSettings,
    output: Path,
    command: str,
    overwrite: bool = False,
    shown: Callable[[dict[str, Any]], None] = lambda _: None,
    closed: Callable[[], object] = lambda: None,
) -> BenchResults:
    """Measures; `shown` is called with each load's results, `closed` when results.json stands.

    The file is whole after every run, and `closed` is called however the sweep ended.

    Raises LeanMoeError for bad input before anything is measured, and for whatever ends the sweep
    early; what was measured until then stays in the file, marked incomplete.
    """
    settings.check()
    settings.check_targets()
    path = output / RESULTS
    if path.exists() and not overwrite:
        raise LeanMoeError(f"{path} exists: choose another --output, or add --overwrite")
    if settings.over_http:
        runner, supply, source = _http(settings)
    elif settings.engine == "vllm":
        runner, supply, source = _vllm(settings)
    else:
        runner, supply, source = _in_process(settings)
    about = {
        "provenance": collect(command, settings.seed).to_json(),
        **runner.describe(),
        "text": settings.dataset_path or source,
    }
    record = Record(path, settings, runner.variants(), about)
    record.save()

    def load_done(load: ServiceLoad) -> None:
        shown(record.entry(load))

    try:
        sweep(runner, supply, settings, record, load_done)
    except LeanMoeError as error:
        kept = "nothing was measured:" if record.is_empty else "what was measured is in"
        raise LeanMoeError(f"{error}; {kept} {path}, marked incomplete") from error
    finally:
        closed()
    return BenchResults.from_json(record.to_json())


def _in_process(settings: BenchSettings) -> tuple[Runner, Supply, str]:
    (name,) = settings.targets
    plans = _plans(settings)
    from leanmoe.bench.in_process import InProcess
    from leanmoe.runtime import load_model, require_batching

    quiet_transformers()
    model, tokenizer = load_model(
        name, settings.dtype, settings.trust_remote_code, require_batching
    )
    source, supply = make_supply(settings, tokenizer)
    rules = {variant: each.plan for variant, each in plans.items()}
    return InProcess(model, name, rules, settings, supply), supply, source


def _http(settings: BenchSettings) -> tuple[Runner, Supply, str]:
    servers = [
        ask(read_address(target, settings.allow_remote), settings.served_model)
        for target in settings.targets
    ]
    names = [server.name for server in servers]
    if twice := [name for name in names if names.count(name) > 1]:
        raise LeanMoeError(
            f"{twice[0]} was given twice: name servers apart, like full=URL plan=URL"
        )
    tokenizer = load_tokenizer(settings, servers)
    from leanmoe.bench.over_http import OverHTTP

    source, supply = make_supply(settings, tokenizer)
    for server in servers:
        if server.max_tokens is not None and supply.longest > server.max_tokens:
            raise LeanMoeError(
                f"prompt and reply have up to {supply.longest:,} tokens: {server.name} takes at "
                f"most {server.max_tokens:,}; set --input-len and --output-len"
            )
    return OverHTTP(servers, tokenizer, settings, supply), supply, source


def _vllm(settings: BenchSettings) -> tuple[Runner, Supply, str]:
    plans = _plans(settings)
    from leanmoe.bench.vllm_server import VLLMServer
    from leanmoe.core.installed_vllm import require_vllm

    require_vllm(bool(plans))
    tokenizer = load_tokenizer(settings, [])
    source, supply = make_supply(settings, tokenizer)
    return VLLMServer(settings.targets[0], plans, tokenizer, settings, supply), supply, source


def _plans(settings: BenchSettings) -> dict[str, Named]:
    """The plans by their files' names, checked from the model's config.json alone."""
    model = read_shape(settings.targets[0]).fingerprint()
    plans = read_plans(settings.plan, (), model, by_folder=False, levels=settings.level)
    return {each.name: each for each in plans}


def make_supply(settings: BenchSettings, tokenizer: Any) -> tuple[str, Supply]:
    """Where prompts come from, and what draws them."""
    rows = read_dataset(Path(settings.dataset_path), tokenizer) if settings.dataset_path else []
    source, stream = read_stream(settings.text, tokenizer)
    return source, Supply(stream, settings.input_len, settings.output_len, rows, settings.seed)


def load_tokenizer(settings: BenchSettings, servers: Sequence[Server]) -> Any:
    """The tokenizer that cuts prompts to length: of --tokenizer, or of what is served."""
    from transformers import AutoTokenizer

    quiet_transformers()
    guesses = [settings.tokenizer] if settings.tokenizer else _guesses(settings, servers)
    for guess in guesses:
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                folder_of(guess), trust_remote_code=settings.trust_remote_code
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


def _guesses(settings: BenchSettings, servers: Sequence[Server]) -> list[str]:
    if not servers:
        return [settings.targets[0]]
    first = servers[0]
    return [guess for guess in (first.root, first.model) if guess and Path(guess).is_dir()]
