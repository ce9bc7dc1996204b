"""Which vLLM is at work, and whether what leanmoe touches in it is as in one that leanmoe ran with.

vLLM's files are read, not run: so `leanmoe serve --check` can ask without a model, and without vLLM
starting up. `hook_signatures.json` beside this file has the signatures for each version whose files
were read; `scripts/vllm_hooks.py` writes it. A signature here is what a caller can see: a
function's parameters, their kinds and which of them have defaults; of a class or an attribute only
that it is there. Annotations and the values of defaults do not count.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from importlib import resources
from importlib.util import find_spec
from pathlib import Path

from leanmoe.core.errors import LeanMoeError
from leanmoe.core.installed_vllm import RAN, release

ABSENT = "absent"
"""Stands for a signature where the symbol, or its file, is not there."""
DIGITS = 12
"""Hexadecimal digits of a signature's sha256 that are kept."""
_MOE = "model_executor.layers.fused_moe"

ROUTING = {
    f"{_MOE}.router.base_router:BaseRouter": (
        "_compute_routing _select_experts _apply_eplb_mapping top_k global_num_experts"
    ),
    f"{_MOE}.router.fused_moe_router:FusedMoERouter": "eplb_state",
    f"{_MOE}.router.fused_topk_router:FusedTopKRouter": "_compute_routing scoring_func renormalize",
    f"{_MOE}.router.fused_topk_bias_router:FusedTopKBiasRouter": (
        "_compute_routing e_score_correction_bias scoring_func renormalize routed_scaling_factor"
    ),
    f"{_MOE}.router.grouped_topk_router:GroupedTopKRouter": (
        "_compute_routing e_score_correction_bias num_expert_group topk_group scoring_func "
        "renormalize routed_scaling_factor num_fused_shared_experts"
    ),
}
"""How a layer's experts are chosen: `layer_routing` stands here, `checks` reads the fields."""
LAYERS = {
    f"{_MOE}.runner.moe_runner:MoERunner": (
        "__init__ router moe_config routed_experts layer_name do_naive_dispatch_combine "
        "expert_map_manager"
    ),
    f"{_MOE}.expert_map_manager:ExpertMapManager": "placement_strategy expert_map",
    f"{_MOE}.routed_experts:RoutedExperts": (
        "expert_map activation apply_router_weight_on_input quant_method"
    ),
    f"{_MOE}.fused_moe_method_base:FusedMoEMethodBase": "is_monolithic moe_kernel",
    f"{_MOE}.config:FusedMoEConfig": (
        "moe_parallel_config is_lora_enabled is_sequence_parallel tp_size tp_rank dp_size ep_size "
        "ep_rank pcp_size use_ep"
    ),
    f"{_MOE}.config:FusedMoEParallelConfig": "all2all_backend enable_eplb",
    "model_executor.model_loader.base_loader:BaseModelLoader": "load_model",
    "config.vllm": "get_current_vllm_config",
    "config.vllm:VllmConfig": "use_v2_model_runner additional_config",
    "config.parallel:ParallelConfig": "use_ubatching worker_extension_cls",
    "distributed.utils": "get_pp_indices",
}
"""What a layer, and the model it is a part of, say of themselves."""
STEPS = {
    "forward_context": "get_forward_context is_forward_context_available",
    "forward_context:ForwardContext": "dp_metadata slot_mapping additional_kwargs is_padding",
    "forward_context:DPMetadata": "num_tokens_across_dp_cpu",
}
"""What is known of the running step."""
RUNNERS = {
    "v1.worker.gpu_model_runner:GPUModelRunner": (
        "execute_model capture_model profile_run sample_tokens"
    ),
    "v1.worker.gpu.model_runner:GPUModelRunner": (
        "execute_model capture_model profile_run sample_tokens"
    ),
    "v1.core.sched.output:SchedulerOutput": "make_empty",
    "v1.core.sched.output": "NewRequestData",
    "entrypoints.cli.main": "main",
}
"""What starts a server and runs a step. Parameters come and go, but those that leanmoe uses are
there; real steps try them when a model is loaded."""
ROWS = {
    "v1.worker.gpu_model_runner:GPUModelRunner": (
        "_prepare_inputs _dummy_run input_batch positions query_start_loc device"
    ),
    "v1.worker.gpu_input_batch:InputBatch": (
        "num_reqs req_ids num_prompt_tokens num_computed_tokens_cpu"
    ),
    "v1.worker.gpu.model_runner:GPUModelRunner": "prepare_inputs req_states device",
    "v1.worker.gpu.input_batch:InputBatch": (
        "num_reqs req_ids idx_mapping_np num_scheduled_tokens num_computed_tokens_np positions "
        "query_start_loc"
    ),
    "v1.worker.gpu.states:RequestState": "prompt_len",
    "v1.core.sched.output:SchedulerOutput": (
        "scheduled_new_reqs finished_req_ids num_scheduled_tokens"
    ),
    "v1.core.sched.output:NewRequestData": "req_id sampling_params",
    "sampling_params:SamplingParams": "prompt_logprobs",
}
"""By what the rows of a step are told apart (`rule_rows`). They must be there where a plan has
rules for prompt rows; the debug mode compares what they say."""
EXPERTS = {
    f"{_MOE}.modular_kernel:FusedMoEKernel": "impl",
    f"{_MOE}.modular_kernel:FusedMoEKernelModularImpl": "fused_experts",
    f"{_MOE}.modular_kernel:FusedMoEExperts": "quant_config",
    f"{_MOE}.experts.triton_moe:TritonExperts": "apply moe_sum",
    f"{_MOE}.fused_moe": "_prepare_expert_assignment fused_moe_kernel",
    f"{_MOE}.moe_align_block_size": "moe_align_block_size",
    "_custom_ops": "moe_sum",
}
"""How skipped slots are passed over. A vLLM where these differ still runs a plan: each is tried
when a model is loaded, and a slot that cannot be passed over repeats the token's best expert."""
OPTIONAL = {
    f"{_MOE}.expert_substitution:SubstitutedRoutedExperts": "expert_substitution",
    f"{_MOE}.router.fused_moe_router:FusedMoERouter": "supports_monolithic_kernels",
    f"{_MOE}.router.cpu_router:CPURouter": "_compute_routing",
    "v1.worker.gpu_model_runner:GPUModelRunner": "_prepare_padding_mask",
    "config.model:ModelConfig": "enable_return_routed_experts",
    "config.aux_output:AuxOutputConfig": "enable_return_routed_experts",
}
"""What some versions have and others lack, and leanmoe uses or refuses where it is there."""


def symbols_of(*groups: dict[str, str]) -> tuple[str, ...]:
    """The symbols of groups: the module below `vllm`, a colon, the class if any, the name."""
    return tuple(
        f"{owner}.{name}" if ":" in owner else f"{owner}:{name}"
        for group in groups
        for owner, names in group.items()
        for name in names.split()
    )


SYMBOLS = symbols_of(ROUTING, LAYERS, STEPS, RUNNERS, ROWS, EXPERTS, OPTIONAL)
"""All of them."""

Read = Callable[[str], str | None]
"""Gives the text of a file by its path below the package `vllm`; None where there is none."""


def read_signatures(read: Read, symbols: Iterable[str] = SYMBOLS) -> dict[str, str]:
    """The hash of each symbol's signature in the vLLM whose files `read` gives.

    Each file is parsed once and nothing of it is run. Raises SyntaxError for a file that this
    Python cannot parse.
    """

    @cache
    def tree(module: str) -> ast.Module | None:
        text = read(module.replace(".", "/") + ".py")
        return None if text is None else ast.parse(text)

    hashes = {}
    for symbol in symbols:
        module, _, name = symbol.partition(":")
        parsed = tree(module)
        signature = None if parsed is None else _signature(parsed, name.split("."))
        hashes[symbol] = ABSENT if signature is None else _hash(signature)
    return hashes


def known_signatures() -> dict[str, dict[str, str]]:
    """The hashes by version and symbol that were read when this leanmoe was made."""
    text = resources.files(__package__).joinpath("hook_signatures.json").read_text("utf-8")
    known: dict[str, dict[str, str]] = json.loads(text)
    return known


def _hash(signature: str) -> str:
    return hashlib.sha256(signature.encode()).hexdigest()[:DIGITS]


def _signature(tree: ast.Module, names: list[str]) -> str | None:
    """What a caller can see of a symbol; None if it is not there."""
    head, *rest = names
    definitions = [node for node in _definitions(tree.body) if node.name == head]
    if not definitions:
        return None
    if not rest:
        return " or ".join(sorted({_shown(node) for node in definitions}))
    owners = [node for node in definitions if isinstance(node, ast.ClassDef)]
    return next((s for owner in owners if (s := _member(owner, rest[0])) is not None), None)


def _definitions(body: Iterable[ast.stmt]) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    """The functions and classes of a module, those under an `if` or `try` included."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node
        elif isinstance(node, ast.If | ast.Try):
            yield from _definitions([*node.body, *node.orelse])


def _member(owner: ast.ClassDef, name: str) -> str | None:
    """A method's signature; of a property, field or attribute that a method sets, that it is one.

    Base classes are not followed: a symbol names the class that has it.
    """
    for node in owner.body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return _shown(node)
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == name:
            return "attribute"
        if isinstance(node, ast.Assign) and name in map(ast.unparse, node.targets):
            return "attribute"
    is_set = any(
        isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and ast.unparse(node) == f"self.{name}"
        for node in ast.walk(owner)
    )
    return "attribute" if is_set else None


def _shown(node: ast.FunctionDef | ast.ClassDef) -> str:
    if isinstance(node, ast.ClassDef):
        return "class"
    marks = {ast.unparse(mark).rpartition(".")[2] for mark in node.decorator_list}
    if marks & {"property", "cached_property"}:
        return "attribute"
    kinds = "".join(f"@{kind} " for kind in sorted(marks & {"staticmethod", "classmethod"}))
    return f"{kinds}({', '.join(_parameters(node.args))})"


def _parameters(arguments: ast.arguments) -> Iterator[str]:
    """Parameters as they stand in a definition, with `=` for those that have a default."""
    positional = [*arguments.posonlyargs, *arguments.args]
    first_default = len(positional) - len(arguments.defaults)
    for number, each in enumerate(positional):
        yield each.arg + ("=" if number >= first_default else "")
        if number + 1 == len(arguments.posonlyargs):
            yield "/"
    if arguments.vararg is not None:
        yield f"*{arguments.vararg.arg}"
    elif arguments.kwonlyargs:
        yield "*"
    for each, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        yield each.arg + ("" if default is None else "=")
    if arguments.kwarg is not None:
        yield f"**{arguments.kwarg.arg}"


EQUAL = symbols_of(ROUTING, LAYERS, STEPS)
"""What must be as in a version that ran."""
THERE = symbols_of(RUNNERS)
"""What must be there; only its first parameters are used, by name."""


def version() -> str:
    """The version of the vLLM that is imported, without what its build adds to the number."""
    import vllm

    return str(vllm.__version__).partition("+")[0]


def naming(error: LeanMoeError, number: str) -> LeanMoeError:
    """The refusal with vLLM's version in its line."""
    said = str(error)
    return error if number in said else LeanMoeError(f"vLLM {number}: {said}")


def skips_padding_by_default(number: str) -> bool:
    """Whether VLLM_MOE_SKIP_PADDING is 1 in this version unless it is set."""
    return release(number) >= (0, 27)


def files_of_vllm() -> Read:
    """Gives the text of the installed vLLM's files."""

    def read(name: str) -> str | None:
        spec = find_spec("vllm")
        places = [] if spec is None else list(spec.submodule_search_locations or [])
        paths = [Path(place, name) for place in places]
        return next((path.read_text("utf-8") for path in paths if path.is_file()), None)

    return read


def check_hooks(number: str, read: Read) -> str:
    """What is known of vLLM `number`, whose files `read` gives, as a line for the log.

    Raises LeanMoeError for a version that leanmoe never ran with, unless what it touches there has
    the signatures of one that it ran with.
    """
    if number in RAN:
        return f"vLLM {number} is one that leanmoe ran with"
    like, differing = nearest(read)
    if differing:
        raise LeanMoeError(
            f"vLLM {number} was never run with leanmoe, and {differing[0]} is another than in "
            f"{like}: install one of {', '.join(RAN)}, or unset LEANMOE_PLAN"
        )
    return f"vLLM {number} was never run with leanmoe, but is as {like} in what leanmoe touches"


def check_rows(number: str, read: Read) -> None:
    """Raises LeanMoeError for a vLLM that lacks something by which prompt rows are told apart."""
    asked = symbols_of(ROWS)
    found = read_signatures(read, asked)
    if missing := [symbol for symbol in asked if found[symbol] == ABSENT]:
        raise LeanMoeError(
            f"vLLM {number} has no {missing[0]}, by which prompt rows are told apart: "
            "set LEANMOE_DROP=prompt to run the bands without prompt rules"
        )


def nearest(read: Read) -> tuple[str, list[str]]:
    """The version that ran which is most like this one, and the symbols that differ from it."""
    found = read_signatures(read, (*EQUAL, *THERE))
    missing = [symbol for symbol in THERE if found[symbol] == ABSENT]
    known = known_signatures()
    differing = {
        ran: [symbol for symbol in EQUAL if found[symbol] != known[ran][symbol]] + missing
        for ran in reversed(RAN)
        if ran in known
    }
    best = min(differing, key=lambda ran: len(differing[ran]))
    return best, differing[best]
