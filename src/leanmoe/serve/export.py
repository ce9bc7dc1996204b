"""What each engine needs to run a plan, and which parts of it the engine cannot run.

Needs no torch and no engine.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from shlex import quote
from typing import Any

from leanmoe.core.environment import DROP, LEVEL, PLAN
from leanmoe.core.errors import LeanMoeError, unknown_name
from leanmoe.core.installed_sglang import TESTED
from leanmoe.models.hf_config import read_config, setting_path
from leanmoe.plan import Plan, Rule
from leanmoe.serve.plugin_options import PROMPT, check_parts, notes, without
from leanmoe.serve.vllm.launch import capture_sizes

ENGINES = ("vllm", "sglang", "llama.cpp", "transformers")
SGLANG_NOTE = f"written for SGLang {TESTED}: run in its routing on a CPU, in no server on a GPU"
GGUF = {
    "BailingMoeV2ForCausalLM": "bailingmoe2", "DeepseekV2ForCausalLM": "deepseek2",
    "DeepseekV3ForCausalLM": "deepseek2", "Dots1ForCausalLM": "dots1",
    "Ernie4_5_MoeForCausalLM": "ernie4_5-moe", "Glm4MoeForCausalLM": "glm4moe",
    "GptOssForCausalLM": "gpt-oss", "GraniteMoeForCausalLM": "granitemoe",
    "HunYuanMoEV1ForCausalLM": "hunyuan-moe", "Lfm2MoeForCausalLM": "lfm2moe",
    "MiniMaxM2ForCausalLM": "minimax-m2", "MixtralForCausalLM": "llama",
    "OlmoeForCausalLM": "olmoe", "PhimoeForCausalLM": "phimoe", "Qwen2MoeForCausalLM": "qwen2moe",
    "Qwen3MoeForCausalLM": "qwen3moe", "Qwen3NextForCausalLM": "qwen3next",
}  # fmt: skip
"""llama.cpp's name (`general.architecture`) for some of Transformers' classes."""

PLAIN_TOP_K = frozenset(GGUF) - {"Ernie4_5_MoeForCausalLM", "HunYuanMoEV1ForCausalLM"}
"""Classes whose config.json has num_experts_per_tok, and no language model's part of its own."""


@dataclass(frozen=True)
class Recipe:
    """How to run a plan in an engine."""

    engine: str
    environment: dict[str, str] = field(default_factory=dict)
    command: tuple[str, ...] = ()
    code: str = ""
    """Python to run, where there is no command."""
    notes: tuple[str, ...] = ()
    """What the user should know of how the engine runs the plan, one sentence each."""
    left_out: tuple[str, ...] = ()
    """Parts of the plan that do not run, with the user's consent."""

    def text(self) -> str:
        """A script: comments, and what to run."""
        lines = [f"# {note}" for note in self.notes]
        lines += [f"# Left out of the plan: {part}" for part in self.left_out]
        if self.code:
            return "\n".join([*lines, self.code])
        variables = [f"{name}={quote(value)}" for name, value in self.environment.items()]
        return "\n".join([*lines, " ".join([*variables, *map(quote, self.command)])])

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return asdict(self)


def export(
    plan: Plan,
    path: Path,
    engine: str,
    model: str = "MODEL",
    drop: Sequence[str] = (),
    gguf: str | None = None,
    level: str | None = None,
) -> Recipe:
    """What `engine` needs to run the plan at `path`; `gguf` is llama.cpp's name for such models.

    Raises LeanMoeError for a plan that the engine cannot run, unless the user drops that part, and
    for one with several levels where none is chosen.
    """
    if engine not in ENGINES:
        raise unknown_name("engine", engine, ENGINES)
    whole = plan.at(level)
    plan = without(whole, drop)
    left_out = tuple(part for part in drop if whole != plan)
    if engine == "transformers":
        if drop:
            raise LeanMoeError("transformers runs all of a plan: leave --drop away")
        return Recipe(engine, code=_code(path, model, level))
    if engine == "llama.cpp":
        return _llama_cpp(plan, model, gguf, left_out)
    name = {"vllm": "vLLM", "sglang": "SGLang"}[engine]
    check_parts(plan, name, f"--drop {PROMPT}")
    variables = {PLAN: str(path.resolve())}
    if level is not None:
        variables[LEVEL] = level
    if drop:
        variables[DROP] = ",".join(drop)
    recipe = Recipe(engine, variables, notes=notes(plan, name), left_out=left_out)
    return _vllm(recipe, plan, model) if engine == "vllm" else _sglang(recipe, plan, model)


def _vllm(recipe: Recipe, plan: Plan, model: str) -> Recipe:
    """The recipe with vLLM's command, and with what it needs to know."""
    command = ["vllm", "serve", model]
    if sizes := capture_sizes(plan):
        settings = json.dumps({"cudagraph_capture_sizes": sizes}, separators=(",", ":"))
        command += ["--compilation-config", settings]
    remarks = list(recipe.notes)
    if (changed := top_k_override(plan, model)) is not None:
        override = json.dumps(changed)
        remarks.append(f"the same without a plugin: vllm serve {model} --hf-overrides '{override}'")
    return replace(recipe, command=tuple(command), notes=tuple(remarks))


def _sglang(recipe: Recipe, plan: Plan, model: str) -> Recipe:
    """The recipe with SGLang's command, without the plugin where one top_k is all of the plan."""
    command = ["python", "-m", "sglang.launch_server", "--model-path", model]
    remarks = [*recipe.notes, SGLANG_NOTE]
    if (changed := top_k_override(plan, model)) is None:
        return replace(recipe, command=tuple(command), notes=tuple(remarks))
    command += ["--json-model-override-args", json.dumps(changed)]
    remarks.append("a top_k that is the same everywhere needs no plugin")
    return replace(recipe, environment={}, command=tuple(command), notes=tuple(remarks))


def top_k_override(plan: Plan, model: str) -> dict[str, Any] | None:
    """What changes in the model's config.json where one `top_k` is all of the plan.

    None where it is not, and where the key that the model reads is not known: an override of a
    key that nothing reads would serve the full model under the plan's name. Engines merge what
    stands under text_config, and under no other part.
    """
    top_k = uniform_top_k(plan)
    if top_k is None:
        return None
    if not Path(model).exists():
        is_plain = plan.model.architecture in PLAIN_TOP_K
        return {"num_experts_per_tok": top_k} if is_plain else None
    *parts, key = setting_path(read_config(model), "num_experts_per_tok")
    if not parts:
        return {key: top_k}
    return {"text_config": {key: top_k}} if parts == ["text_config"] else None


def uniform_top_k(plan: Plan) -> int | None:
    """The `top_k` of a plan that has nothing else, the same in all layers at every load."""
    rules = {rule for band in plan.bands for rule in band.rules}
    is_everywhere = bool(plan.bands) and plan.bands[-1].up_to is None
    if len(rules) != 1 or not is_everywhere or any(not rule.is_empty for rule in plan.prompt):
        return None
    rule = next(iter(rules))
    return rule.top_k if rule == Rule(top_k=rule.top_k) else None


def _llama_cpp(plan: Plan, model: str, gguf: str | None, left_out: tuple[str, ...]) -> Recipe:
    if any(not rule.is_empty for rule in plan.prompt):
        raise LeanMoeError(
            "llama.cpp has no rules for prompt tokens; --drop prompt leaves them out"
        )
    top_k = plan.model.top_k if plan.is_empty else uniform_top_k(plan)
    if top_k is None:
        raise LeanMoeError(
            "llama.cpp can only run one top_k, the same in all layers at every load: this plan has "
            f"{_reason(plan)}; use vllm, sglang or transformers"
        )
    name = gguf or GGUF.get(plan.model.architecture)
    if name is None:
        raise LeanMoeError(
            f"llama.cpp's name for {plan.model.architecture} is not known: give it as --gguf-arch "
            "(general.architecture in the GGUF file)"
        )
    override = f"{name}.expert_used_count=int:{top_k}"
    return Recipe(
        "llama.cpp", {}, ("llama-server", "-m", model, "--override-kv", override),
        notes=("-m wants the model as a GGUF file",), left_out=left_out,
    )  # fmt: skip


def _reason(plan: Plan) -> str:
    """Which part of a plan is more than one `top_k`."""
    rules = {rule for band in plan.bands for rule in band.rules}
    fields = sorted({name for rule in rules for name in rule.to_json()} - {"top_k"})
    if fields:
        return ", ".join(fields)
    if len(plan.bands) > 1 or plan.bands[-1].up_to is not None:
        return "bands"
    return "other values of top_k in other layers"


def _code(path: Path, model: str, level: str | None) -> str:
    at = "" if level is None else f'.at("{level}")'
    return (
        "import leanmoe\n"
        "from leanmoe import Plan\n"
        "from transformers import AutoModelForCausalLM\n\n"
        f"model = AutoModelForCausalLM.from_pretrained({model!r})\n"
        f'with leanmoe.apply(model, Plan.load("{path}"){at}, experts="leanmoe"):\n'
        "    model.generate(...)"
    )
