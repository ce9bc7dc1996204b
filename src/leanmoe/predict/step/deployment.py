"""How a model lies on GPUs: parallelism, what fits, who holds what. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from leanmoe.core.errors import LeanMoeError
from leanmoe.models.shape import MoEShape
from leanmoe.predict.experts.spread import RankLayout
from leanmoe.predict.hardware.gpus import Gpu
from leanmoe.predict.settings import PredictSettings

USABLE = 0.92
"""Share of a GPU's memory for weights, activations and cache, as engines set it by default."""
RESERVED = 3e9
"""Bytes for activations, graphs, communication buffers and the runtime."""
MOST_GPUS = 16384


@dataclass(frozen=True)
class Deployment:
    """Parallelism: `tensor` splits attention and widths, `data` copies attention, `expert` spreads
    whole experts, `pipeline` splits layers. GPUs = tensor x data x pipeline; experts lie over the
    tensor x data of a pipeline stage, and where `expert` is less, their widths are split.
    """

    gpu: Gpu
    tensor: int = 1
    expert: int = 1
    data: int = 1
    pipeline: int = 1

    @property
    def gpus(self) -> int:
        """All of them."""
        return self.tensor * self.data * self.pipeline

    @property
    def stage(self) -> int:
        """GPUs of a pipeline stage."""
        return self.tensor * self.data

    @property
    def expert_tensor(self) -> int:
        """GPUs over which one expert's width is split."""
        return self.stage // self.expert

    @property
    def exchanges(self) -> bool:
        """Whether tokens travel to their experts: attention is copied, experts are spread."""
        return self.data > 1 and self.expert > 1

    def scope(self, cross_rank: bool = False) -> RankLayout:
        """Where experts are, and whose tokens share them."""
        return RankLayout(self.expert, self.data, cross_rank)

    def __str__(self) -> str:
        parts = [f"TP{self.tensor}"]
        parts += [f"EP{self.expert}"] if self.expert > 1 else []
        parts += [f"DP{self.data}"] if self.data > 1 else []
        parts += [f"PP{self.pipeline}"] if self.pipeline > 1 else []
        return f"{self.gpus} x {self.gpu.name} ({' '.join(parts)})"

    def check(self, model: MoEShape) -> None:
        """Raises LeanMoeError where the model cannot be split so, or its bytes cannot be told."""
        if model.storage.unknown is not None:
            raise LeanMoeError(
                f"bytes of {model.name}'s weights cannot be told: {model.storage.unknown}; "
                "nothing can be predicted from them"
            )
        for name in ("tensor", "expert", "data", "pipeline"):
            value = getattr(self, name)
            if value < 1:
                raise LeanMoeError(f"--{name}-parallel-size is {value}: it must be 1 or more")
        if self.gpus > MOST_GPUS:
            raise LeanMoeError(f"{self.gpus} GPUs: at most {MOST_GPUS} are modelled")
        for kind, _ in model.attention:
            _require_divides("attention heads", kind.heads, self.tensor, "--tensor-parallel-size")
        stage = "GPUs of --tensor-parallel-size x --data-parallel-size"
        _require_divides(stage, self.stage, self.expert, "--expert-parallel-size")
        _require_divides("experts", model.experts, self.expert, "--expert-parallel-size")
        _require_divides(
            "values of an expert's width", model.expert_width, self.expert_tensor, "TP"
        )
        if self.pipeline > model.layers:
            raise LeanMoeError(
                f"--pipeline-parallel-size {self.pipeline} is more than the model's "
                f"{model.layers} layers"
            )

    def weight_bytes(self, model: MoEShape, experts: float | None = None) -> float:
        """Bytes of weights on each GPU; `experts` a layer where some are pruned."""
        each, stored = model.parameters, model.storage
        kept = model.weighted_experts if experts is None else experts
        routed = len(model.moe_layers) * kept + len(model.hash_layers) * model.experts
        whole = model.copied_weights
        split = (each.mixers - whole) * stored.mixer_bytes
        split += each.dense * stored.dense_bytes + each.shared * stored.shared_bytes
        copied = each.routers * stored.router_bytes + each.norms * stored.plain_bytes
        copied += whole * stored.mixer_bytes
        ends = each.embedding * stored.embedding_bytes + each.head * stored.head_bytes
        spread = routed * model.expert_bytes / self.stage
        ends /= self.tensor * min(self.pipeline, 2)
        return (split / self.tensor + copied + spread) / self.pipeline + ends

    def memory(self, model: MoEShape, experts: float | None = None) -> Memory:
        """What lies on each GPU; raises LeanMoeError, by how much, where weights do not fit."""
        weights = self.weight_bytes(model, experts)
        usable = self.gpu.memory * USABLE - RESERVED
        if weights > usable:
            short = (weights - usable) * self.gpus
            raise LeanMoeError(
                f"{model.name} does not fit {self}: {weights / 1e9:.1f} GB of weights on each GPU, "
                f"{usable / 1e9:.1f} GB usable; {short / 1e9:.0f} GB short in all"
            )
        return Memory(weights, usable - weights, self.data)


@dataclass(frozen=True)
class Memory:
    """Bytes on each GPU."""

    weights: float
    cache: float
    """Left for the KV cache."""
    copies: int
    """Copies of attention, each with a cache of its own."""

    def sequences(self, model: MoEShape, context: float, deployment: Deployment) -> int:
        """Sequences with `context` tokens that fit in the cache, over all copies."""
        each = model.cached_bytes(context, deployment.tensor) / deployment.pipeline
        return int(self.cache // each) * self.copies if each else 1 << 30


MOST_CHOSEN = 64
"""GPUs that are tried before a user has to say how many."""


def find_deployment(model: MoEShape, gpu: Gpu, asked: PredictSettings) -> Deployment:
    """What the user asked for; with nothing said, the fewest GPUs (a power of 2) that hold it.

    Raises LeanMoeError where the sizes contradict each other and where the model does not fit.
    """
    gpus, tensor = next(iter(asked.gpus), None), asked.tensor_parallel_size
    expert, data = asked.expert_parallel_size, asked.data_parallel_size
    pipeline = asked.pipeline_parallel_size
    copies = data * pipeline
    if tensor is None and gpus is None and copies == 1:
        return _fewest(model, gpu, expert)
    if tensor is None:
        if gpus is not None and gpus % copies:
            raise LeanMoeError(
                f"--gpus {gpus} is no multiple of --data-parallel-size x "
                f"--pipeline-parallel-size, {copies}"
            )
        tensor = max(1, (gpus or copies) // copies)
    here = Deployment(gpu, tensor, expert, data, pipeline)
    if gpus is not None and here.gpus != gpus:
        raise LeanMoeError(
            f"--tensor-parallel-size {tensor} x --data-parallel-size {data} x "
            f"--pipeline-parallel-size {pipeline} are {here.gpus} GPUs, --gpus says {gpus}"
        )
    here.check(model)
    here.memory(model)
    return here


def _fewest(model: MoEShape, gpu: Gpu, expert: int) -> Deployment:
    last: LeanMoeError | None = None
    count = max(1, expert)
    while count <= MOST_CHOSEN:
        tensor = min(count, gpu.per_node)
        here = Deployment(gpu, tensor, expert, count // tensor)
        try:
            here.check(model)
            here.memory(model)
        except LeanMoeError as error:
            last = error
            count *= 2
            continue
        return here
    raise last or LeanMoeError(f"--expert-parallel-size {expert}: say how the model lies on GPUs")


def _require_divides(what: str, whole: int, by: int, flag: str) -> None:
    """Raises LeanMoeError unless `by` divides `whole`."""
    if whole % by:
        allowed = [n for n in range(1, whole + 1) if whole % n == 0]
        raise LeanMoeError(
            f"{flag} {by} does not divide {whole} {what}: it must be one of "
            f"{', '.join(map(str, allowed[:12]))}"
        )
