"""A Transformers model at hand: loading it, finding its MoE layers, watching and resuming it.

Nothing is looked up by a family's name: an MoE layer is a module that holds experts beside a
router.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from leanmoe.core.errors import LeanMoeError
from leanmoe.kernels import expert_rows
from leanmoe.models.hf_config import FILE
from leanmoe.models.reference import folder_of
from leanmoe.models.routers import Router
from leanmoe.models.shape import MoEShape, read_shape
from leanmoe.runtime.transformers_experts import experts_forward, has_interface, prepared

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(
    name: str,
    dtype: str | None = None,
    trust_remote_code: bool = False,
    require: Callable[[Any], object] | None = None,
) -> tuple[Any, Any]:
    """The model, ready to run, and its tokenizer.

    `name` is a folder, a hub name (local cache first, then the network) or "reference". Without
    `dtype` weights load as float32 on a CPU and as they are stored on a GPU. Only safetensors are
    read: nothing is unpickled. `require` is called with the model before it has weights, and raises
    LeanMoeError where the model cannot do what it is loaded for.

    Raises LeanMoeError for what is missing, damaged, no mixture-of-experts model, or one that
    Transformers or a plan cannot run; the last two before any weight is read.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    shape = read_shape(name)
    shape.fingerprint()
    if shape.not_loadable is not None:
        raise LeanMoeError(f"model {name} cannot be run in this process: {shape.not_loadable}")
    if dtype is not None and dtype not in DTYPES:
        raise LeanMoeError(f"dtype is {dtype!r}: it must be one of {', '.join(DTYPES)}")
    is_config = Path(name).name == FILE and Path(name).is_file()
    source = str(Path(name).parent) if is_config else folder_of(name)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    wanted: Any = DTYPES[dtype] if dtype else (torch.float32 if device == "cpu" else "auto")
    code = {"trust_remote_code": trust_remote_code}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **code)
        check_tokens(tokenizer, shape.vocabulary)
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source, **code))
            (require or find_layers)(empty)
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=wanted, use_safetensors=True, **code
        )
    except LeanMoeError:
        raise
    except Exception as error:  # safetensors, the hub and Transformers each raise their own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise LeanMoeError(f"model {name} cannot be loaded: {reason}") from error
    if max(getattr(tokenizer, "added_tokens_decoder", ()), default=0) >= shape.vocabulary:
        model.get_input_embeddings().register_forward_pre_hook(require_rows)
    return model.to(device).eval(), tokenizer


def check_tokens(tokenizer: Any, rows: int) -> None:
    """Raises LeanMoeError where text gives token ids beyond the model's embedding of `rows`.

    Added tokens beyond it, which plain text does not give, are said on standard error.
    """
    added = getattr(tokenizer, "added_tokens_decoder", {})
    ids = tokenizer.get_vocab().values()
    highest = max((each for each in ids if each not in added), default=-1)
    if highest >= rows:
        raise LeanMoeError(
            f"the tokenizer has token ids up to {highest:,}, the model's embedding {rows:,} rows: "
            "they do not belong together"
        )
    if beyond := [number for number in added if number >= rows]:
        print(
            f"leanmoe: {len(beyond)} added tokens of the tokenizer (ids from {min(beyond):,}) have "
            f"no row in the model's embedding of {rows:,}: text that holds them cannot be run",
            file=sys.stderr,
        )
    start = tokenizer.bos_token_id
    if start is not None and tokenizer("a")["input_ids"][:2] == [start, start]:
        line = "leanmoe: the tokenizer puts its start token in front of a text twice"
        print(line, file=sys.stderr)


def require_rows(table: nn.Embedding, inputs: tuple[Tensor, ...]) -> None:
    """Before an embedding's forward: raises LeanMoeError for token ids that it has no row for."""
    if inputs and int(inputs[0].max()) >= table.num_embeddings:
        raise LeanMoeError(
            f"the text has token id {int(inputs[0].max()):,}, an added token beyond the model's "
            f"embedding of {table.num_embeddings:,} rows: take it out of the text"
        )


ROUTER_NAMES = ("gate", "router")


def forward_parameters(module: Any) -> tuple[str, ...]:
    """What the forward of a module's class takes by name, beside the module itself."""
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    packs = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return tuple(each.name for each in parameters if each.kind not in packs)


@dataclass(frozen=True)
class MoELayer:
    """One MoE layer of a loaded model."""

    number: int
    """Its place among the MoE layers, from 0."""
    decoder_index: int
    """Its place among all decoder layers."""
    name: str
    router: Any
    """This and the next are modules whose attributes differ by family."""
    experts: Any
    block: nn.Module
    """What holds both."""

    def ranking_bias(self, router: Router) -> Tensor | None:
        """The bias that ranks without weighing, from the router or the block around it."""
        if router.ranking_bias is None:
            return None
        for module in (self.router, self.block):
            bias: object = module
            for name in router.ranking_bias.split("."):
                bias = getattr(bias, name, None)
            if isinstance(bias, Tensor):
                return bias.reshape(-1)
        raise LeanMoeError(
            f"{self.name} has no {router.ranking_bias}: this family's router has one"
        )

    def expert_scale(self, router: Router) -> Tensor | None:
        """The factor [E] on each expert's weight; None where the family has none."""
        return None if router.expert_scale is None else getattr(self.router, router.expert_scale)

    def logits_source(self, router: Router) -> nn.Module:
        """The module whose output has the logits: the router, or a part of it."""
        source: nn.Module = self.router
        return (
            source if router.logits_module is None else source.get_submodule(router.logits_module)
        )

    def logits(self, hidden_TD: Tensor, router: Router) -> Tensor:
        """The router's logits (T,E) for these hidden states."""
        seen: list[Tensor] = []
        hook = self.logits_source(router).register_forward_hook(
            lambda _module, _inputs, output: seen.append(router_logits(output))
        )
        takes_bias = len(forward_parameters(self.router)) > 1  # as Hunyuan's and LFM2's
        bias = (self.ranking_bias(router),) if takes_bias else ()
        with hook:
            try:
                self.router(hidden_TD, *bias)
            except ValueError:  # AFMoE's unpacks the shape of sequences
                self.router(hidden_TD[None], *bias)
        return seen[0].flatten(0, -2)

    @property
    def expert_count(self) -> int:
        """Experts that the router chooses among."""
        own = getattr(self.experts, "total_experts", None)  # LongCat's identities are among them
        return int(self.experts.num_experts if own is None else own)

    @property
    def has_kernel(self) -> bool:
        """Whether a kernel computes the layer's experts, and not the reference."""
        return has_interface(self.experts) and prepared(self.experts)[1].name != "reference"

    def random_input(self, tokens: int, draw: torch.Generator) -> Tensor:
        """Standard normal hidden states [T,D], as the inputs of MoE layers are normalised."""
        up = self.experts.gate_up_proj if self.experts.has_gate else self.experts.up_proj
        width = int(up.shape[1] if self.experts.is_transposed else up.shape[2])
        return torch.randn(tokens, width, generator=draw).to(self.experts.down_proj)

    def run_experts(self, hidden_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """The weighted sum (T,D) of the chosen experts' outputs, by our kernel for them."""
        return experts_forward(self.experts, hidden_TD, ids_TK, weights_TK.to(hidden_TD))

    def outputs_by_expert(
        self, hidden_TD: Tensor, ids_TK: Tensor
    ) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
        """Each used expert with its tokens (X), their slots (X) and what it makes of them (X,D)."""
        weights, _ = prepared(self.experts)
        for expert in sorted(set(ids_TK.flatten().tolist())):
            if expert < weights.experts:
                rows_X, slots_X = (ids_TK == expert).nonzero(as_tuple=True)
                yield expert, rows_X, slots_X, expert_rows(hidden_TD[rows_X], expert, weights)

    def all_outputs(self, hidden_TD: Tensor) -> Tensor:
        """What every expert makes of every token, (T,E,D): for few tokens."""
        weights, _ = prepared(self.experts)
        outputs = [expert_rows(hidden_TD, expert, weights) for expert in range(weights.experts)]
        return torch.stack(outputs, dim=1)


def shape_of(model: Any) -> MoEShape:
    """The shape of a loaded model, from its own config."""
    config = model.config.to_dict()
    config["architectures"] = [type(model).__name__]
    return read_shape(config)


def find_layers(model: Any) -> tuple[MoELayer, ...]:
    """The MoE layers in order; raises LeanMoeError where they do not match the config."""
    shape = shape_of(model)
    layers: list[MoELayer] = []
    for index, decoder in enumerate(decoder_layers(model)):
        if index in shape.hash_layers:
            continue
        for name, block in decoder.named_modules():
            experts = getattr(block, "experts", None)
            router = next((getattr(block, n) for n in ROUTER_NAMES if hasattr(block, n)), None)
            if experts is not None and _is_experts(experts) and isinstance(router, nn.Module):
                path = f"layers.{index}.{name}".removesuffix(".")
                layers.append(MoELayer(len(layers), index, path, router, experts, block))
    indices = tuple(layer.decoder_index for layer in layers)
    if indices != shape.moe_layers:
        raise LeanMoeError(
            f"{shape.architecture}: MoE layers were found at {list(indices)}, "
            f"but its config says {list(shape.moe_layers)}: this family cannot be run yet"
        )
    return tuple(layers)


def router_logits(output: Any) -> Tensor:
    """The logits a router's forward returns, alone or in a tuple.

    They come first, but for Granite's router in Transformers 5.17 (ids, weights, logits).
    """
    if isinstance(output, Tensor):
        return output
    logits: Tensor = output[0] if output[0].is_floating_point() else output[-1]
    return logits


def partial_attention_reason(config: Any) -> str | None:
    """Why a token of this model does not see all tokens before it; None if it does."""
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"]) - {"full_attention"}
    if kinds:
        return f"it has layers of {', '.join(sorted(map(str, kinds)))}"
    window = getattr(config, "sliding_window", None)
    if window is not None and getattr(config, "use_sliding_window", True):
        return f"its attention reaches back {window} tokens only"
    return None


CACHED_LAYERS = {"full_attention", "sliding_attention"}
"""Kinds of layers whose caches Transformers' continuous batching holds (`ATTN_TYPE_TO_ALLOCATOR` of
its `continuous_batching/cache.py`, 5.24)."""


def batching_reason(model: Any) -> str | None:
    """Why Transformers' continuous batching cannot hold this model's caches; None if it can."""
    config = model.config
    kinds = set(getattr(config, "layer_types", None) or ()) - CACHED_LAYERS
    if kinds:
        named = ", ".join(sorted(map(str, kinds)))
        return f"Transformers' continuous batching has no cache for layers of {named}"
    if getattr(model, "_is_stateful", False):
        return "Transformers' continuous batching has no cache for layers that keep a state"
    whole = getattr(config, "qk_head_dim", None)
    if whole is not None and whole != config.v_head_dim:
        return (
            f"Transformers' continuous batching has no cache for keys {whole} wide beside values "
            f"{config.v_head_dim} wide"
        )
    return None


def require_batching(model: Any) -> None:
    """Raises LeanMoeError where the model cannot be served in this process."""
    find_layers(model)
    if reason := batching_reason(model):
        raise LeanMoeError(f"{reason}: measure the model in the engine that serves it")


def decoder_layers(model: Any) -> nn.ModuleList:
    """The decoder layers, the longest list of modules below the model's head."""
    lists = [m for m in model.base_model.modules() if isinstance(m, nn.ModuleList)]
    if not lists:
        raise LeanMoeError(f"{type(model).__name__} has no list of decoder layers")
    return max(lists, key=len)


def _is_experts(module: Any) -> bool:
    """Whether a module takes ids and weights and holds all experts.

    Most have their gate apart, as Transformers' experts interface wants it; LongCat's have not.
    """
    marks = ("_apply_gate", "identity_expert")
    return isinstance(module, nn.Module) and any(hasattr(module, mark) for mark in marks)


Sink = Callable[[int, Tensor], None]


@contextmanager
def record(model: Any, sink: Sink) -> Iterator[None]:
    """Calls `sink(layer number, logits_TE)` for each MoE layer of each forward call.

    Raises LeanMoeError, naming the layer, when a router's logits are not finite.
    """
    router = shape_of(model).router
    with ExitStack() as hooks:
        for layer in find_layers(model):
            source = layer.logits_source(router)
            hooks.callback(source.register_forward_hook(_pass_on(layer, sink)).remove)
        yield


def _pass_on(layer: MoELayer, sink: Sink) -> Callable[[nn.Module, Any, Any], None]:
    def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        logits_TE = router_logits(output).flatten(0, -2).float()
        if not bool(logits_TE.isfinite().all()):
            raise LeanMoeError(f"{layer.name}: router logits are not finite (NaN or infinity)")
        sink(layer.number, logits_TE)

    return hook


@contextmanager
def keep_hidden(model: Any, decoder_indices: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Fills the yielded mapping with the hidden states [S,N,D] that enter these decoder layers."""
    layers = decoder_layers(model)
    kept: dict[int, Tensor] = {}
    with ExitStack() as hooks:
        for index in decoder_indices:
            hook = layers[index].register_forward_pre_hook(_keep(kept, index), with_kwargs=True)
            hooks.callback(hook.remove)
        yield kept


@contextmanager
def resume_from(model: Any, decoder_index: int, hidden_SND: Tensor) -> Iterator[None]:
    """Makes `model`'s forward start at decoder layer `decoder_index` with these hidden states.

    The layers before it do nothing; masks and position embeddings are the model's own, so
    the logits are those of the whole forward, bit for bit. Scoring calls only (no cache).
    """
    layers = decoder_layers(model)
    if not 0 <= decoder_index < len(layers):
        raise LeanMoeError(
            f"decoder layer {decoder_index} does not exist: it must be 0 to {len(layers) - 1}"
        )
    before = [layer.forward for layer in layers[:decoder_index]]
    hook = layers[decoder_index].register_forward_pre_hook(
        lambda _module, inputs, keywords: _replaced(inputs, keywords, hidden_SND), with_kwargs=True
    )
    try:
        for layer in layers[:decoder_index]:
            layer.forward = _pass_through
        yield
    finally:
        hook.remove()
        for layer, forward in zip(layers, before, strict=False):
            if "forward" in vars(layer):
                del layer.forward
            if layer.forward != forward:
                layer.forward = forward


def _pass_through(hidden_states: Tensor, *_inputs: Any, **_keywords: Any) -> Tensor:
    return hidden_states


def _replaced(
    inputs: tuple[Any, ...], keywords: dict[str, Any], hidden_SND: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if "hidden_states" in keywords:
        return inputs, {**keywords, "hidden_states": hidden_SND}
    return (hidden_SND, *inputs[1:]), keywords


def _keep(kept: dict[int, Tensor], index: int) -> Callable[[nn.Module, Any, Any], None]:
    def hook(_module: nn.Module, inputs: Any, keywords: dict[str, Any]) -> None:
        kept[index] = keywords["hidden_states"] if "hidden_states" in keywords else inputs[0]

    return hook
