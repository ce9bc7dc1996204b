"""lm-evaluation-harness's tasks answered by SGLang's own server, one after the other for each plan.

The harness asks through OpenAI's API (`local-completions`), as any user would: the log-probability
of an answer is that of its tokens in a prompt that the server echoes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from leanmoe.bench.server_process import ServerProcess, free_port
from leanmoe.bench.servers import Server, ask
from leanmoe.core.errors import LeanMoeError, first_line
from leanmoe.core.files import write_json
from leanmoe.core.installed_sglang import require_sglang
from leanmoe.core.run_folder import RunFolder
from leanmoe.eval.harness_vllm import Judge, every_step
from leanmoe.eval.settings import EvalSettings
from leanmoe.models.reference import folder_of
from leanmoe.plan.named_plans import Named

SERVE = (sys.executable, "-m", "leanmoe", "serve")


def require_server() -> None:
    """Raises LeanMoeError unless SGLang is here with leanmoe's plugin and can be asked."""
    require_sglang(with_plans=True)
    if find_spec("tenacity") is None:
        raise LeanMoeError("tenacity is not installed: pip install 'leanmoe[eval]'")


def in_sglang(
    each: Named, settings: EvalSettings, folder: RunFolder, judge: Judge
) -> Callable[[], Any]:
    """A step of a run: starts the server, asks, ends it.

    The server scores answers as prompts, in steps of any size: so the rules of a step of
    `--concurrency` tokens are at work at all sizes.
    """

    def compute() -> Any:
        plan = every_step(each.plan, settings.concurrency)
        words = [*SERVE, settings.model, "--engine", "sglang", "--port", str(port := free_port())]
        if not plan.is_empty:
            path = folder.path / "plans" / f"{each.digest}.json"
            write_json(path, plan.to_json())
            words += ["--plan", str(path)]
        words += ["--", "--max-running-requests", str(settings.concurrency)]
        words += ["--dtype", settings.dtype or "auto", "--disable-radix-cache"]
        words += ["--trust-remote-code"] if settings.trust_remote_code else []
        name = f"the SGLang server of {each.name}"
        process = ServerProcess(name, words)
        try:
            server = Server(each.name, f"http://127.0.0.1:{port}", settings.model)
            process.wait_for(server)
            return judge(_asked_of(ask(server), settings), settings)
        except LeanMoeError:
            raise
        except Exception as error:  # whatever the harness raises; said in one line
            process.check()  # what ended the server tells more than that it stopped answering
            raise LeanMoeError(f"{name} could not answer: {first_line(error)}") from error
        finally:
            process.close()

    return compute


def _asked_of(server: Server, settings: EvalSettings) -> Any:
    """The harness's model that asks this server; it tokenises as the model's own files say."""
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    longest = {} if server.max_tokens is None else {"max_length": server.max_tokens}
    return LocalCompletionsAPI(
        base_url=f"{server.url}/v1/completions",
        model=server.model,
        tokenizer=folder_of(settings.model),
        tokenizer_backend="huggingface",
        num_concurrent=settings.concurrency,
        seed=settings.seed,
        trust_remote_code=settings.trust_remote_code,
        **longest,
    )
