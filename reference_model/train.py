"""Trains the reference model on a prepared folder of tokens.

    python -m reference_model.train --data DATA --out RUN --tokens 1500000000 \
        [--architecture qwen3_moe] [--max-seconds 540] [--resume]

`RUN` gets checkpoint.safetensors, log.jsonl (one line every few steps) and model/ (bf16).
With --max-seconds it stops in time, saves, and goes on with --resume; --tokens may then differ
(the rate's schedule runs over the new total), everything else must not.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, dropout, linear
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from leanmoe.core.errors import LeanMoeError
from reference_model import checkpoint, experts
from reference_model.architecture import (
    ARCHITECTURES,
    DeepseekV3Settings,
    ModelSettings,
    build,
    count_flops,
    describe,
    routers,
    to_bf16,
)
from reference_model.balance import BATCH_ALPHA, LoadBalancer
from reference_model.optimiser import MasterAdamW, OptimiserSettings, rate_at
from reference_model.stream import Windows, dev_batches, load_stream

SHARD_BYTES = 14_000_000


@dataclass(frozen=True)
class TrainSettings:
    """One training run. The flags of the command line read their defaults here."""

    tokens: int = 2_380_000_000
    sequences: int = 128
    """Windows of the model's context length per step."""
    experts: str = experts.NAME
    """Experts implementation: leanmoe_training, or Transformers' grouped_mm or eager."""
    compile: bool = False
    """torch.compile attention, norms, the loss and the steps between the experts' products."""
    residual_dropout: float = 0.0
    """On what attention and MLP add to the residual stream."""
    gamma: float = 1e-3
    """The bias update of the aux-loss-free balancing."""
    gamma_off_share: float = 0.05
    """The last share of tokens, trained with biases fixed."""
    alpha: float = 1e-4
    """Factor of the balance loss; a router without bias needs `BATCH_ALPHA`."""
    seed: int = 0
    log_every: int = 20
    dev_every: int = 400
    model: ModelSettings = field(default_factory=DeepseekV3Settings)
    optimiser: OptimiserSettings = field(default_factory=OptimiserSettings)


class Trainer:
    """A model, its optimiser, its data, and how far they have come."""

    def __init__(self, data: Path, out: Path, settings: TrainSettings, device: str) -> None:
        self.settings, self.out = settings, out
        self.device = torch.device(device)
        context = settings.model.context
        ids, self.data_sha256 = load_stream(
            data / "train.bin", settings.model.vocab_size, self.device
        )
        dev_ids, _ = load_stream(data / "dev.bin", settings.model.vocab_size, self.device)
        self.windows = Windows(ids, context, settings.seed)
        self.dev = dev_batches(dev_ids, context, settings.sequences)
        self.model = build(settings.model, settings.seed).to(self.device)
        to_start = dict(self.model.named_parameters())
        self.adam = MasterAdamW(to_start, settings.optimiser)
        to_bf16(self.model)
        # nn.Module.to may swap the tensors behind the names.
        self.adam.weights = list(dict(self.model.named_parameters()).values())
        experts.register()
        self.model.set_experts_implementation(settings.experts)
        self.model.train()
        self.balancer = LoadBalancer(routers(self.model), settings.model.experts, context)
        add_dropout(self.model, settings.residual_dropout)
        # Before anything is compiled: the check's dispatch mode would make dynamo give up on it.
        self.kernel = check_experts(self.model, self.dev[0][0], settings.experts)
        self.cross_entropy = head_loss
        if settings.compile:
            self.cross_entropy = torch.compile(head_loss, dynamic=False)
            compile_parts(self.model)
        self.step = 0
        self.seconds_before = 0.0

    @property
    def step_tokens(self) -> int:
        """Tokens per step."""
        return self.settings.sequences * self.settings.model.context

    @property
    def tokens(self) -> int:
        """Tokens trained on so far."""
        return self.step * self.step_tokens

    def loss(self, inputs_SN: Tensor, targets_SN: Tensor) -> Tensor:
        """Mean next-token cross-entropy, in nats."""
        hidden_SND = self.model.model(input_ids=inputs_SN, use_cache=False).last_hidden_state
        return self.cross_entropy(hidden_SND, self.model.lm_head.weight, targets_SN)

    def train_step(self) -> dict[str, Tensor]:
        """One update; returns device tensors, so that nothing waits for the device."""
        s = self.settings
        inputs_SN, targets_SN = self.windows.batch(self.step * s.sequences, s.sequences)
        loss = self.loss(inputs_SN, targets_SN)
        balance = self.balancer.take_loss()
        (loss + s.alpha * balance).backward()
        norm = self.adam.step(rate_at(self.tokens, s.tokens, s.optimiser))
        moving = self.tokens < s.tokens * (1 - s.gamma_off_share)
        violation_L = self.balancer.update_biases(s.gamma if moving else 0.0)
        self.step += 1
        return {
            "loss": loss.detach(),
            "norm": norm,
            "violation": violation_L,
            "balance": balance.detach(),
        }

    @torch.no_grad()
    def dev_loss(self) -> float:
        """Mean cross-entropy over the dev windows, in nats per token."""
        self.model.eval()
        losses = [self.loss(inputs, targets) * inputs.numel() for inputs, targets in self.dev]
        self.model.train()
        return float(torch.stack(losses).sum()) / sum(inputs.numel() for inputs, _ in self.dev)

    def record(self, seconds: float) -> dict[str, Any]:
        """What a checkpoint says beside its tensors."""
        return {
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds_before + seconds,
            "settings": asdict(self.settings),
            "data_sha256": self.data_sha256,
        }

    def resume(self, path: Path) -> None:
        """Goes on from a checkpoint of the same model, data, seed and batch."""
        record = checkpoint.read_record(path)
        mine = self.record(0.0)
        for key in ("model", "sequences", "seed"):
            if record["settings"][key] != mine["settings"][key]:
                raise LeanMoeError(
                    f"checkpoint {path} was trained with {key}={record['settings'][key]}, "
                    f"this run asks for {mine['settings'][key]}"
                )
        if record["data_sha256"] != self.data_sha256:
            raise LeanMoeError(f"checkpoint {path} was trained on other data (sha256 differs)")
        checkpoint.restore(path, self.model, self.adam)
        self.step, self.seconds_before = record["step"], record["seconds"]

    def save(self, seconds: float) -> None:
        """Writes the checkpoint."""
        checkpoint.save(
            self.out / "checkpoint.safetensors", self.model, self.adam, self.record(seconds)
        )


def head_loss(hidden_SND: Tensor, head_VD: Tensor, targets_SN: Tensor) -> Tensor:
    """Mean cross-entropy of the output matrix's logits, in float32."""
    logits_TV = linear(hidden_SND.flatten(0, 1), head_VD).float()
    return cross_entropy(logits_TV, targets_SN.flatten())


def compile_parts(model: PreTrainedModel) -> None:
    """Compiles what is many small kernels otherwise; routers and hooks stay as they are."""
    experts.fuse()
    model.model.norm.compile(dynamic=False)
    for layer in model.model.layers:
        layer.input_layernorm.compile(dynamic=False)
        layer.self_attn.compile(dynamic=False)
        layer.post_attention_layernorm.compile(dynamic=False)
        if not hasattr(layer.mlp, "gate"):
            layer.mlp.compile(dynamic=False)


def add_dropout(model: PreTrainedModel, share: float) -> None:
    """Drops `share` of what each attention and MLP block adds to the residual stream."""
    if not share:
        return

    def drop_first(module: nn.Module, _inputs: Any, output: tuple[Tensor, Any]) -> Any:
        return dropout(output[0], share, module.training), *output[1:]

    def drop(module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        return dropout(output, share, module.training)

    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(drop_first)
        layer.mlp.register_forward_hook(drop)


class _SeenOperators(TorchDispatchMode):
    """Records the names of the operators that run inside the `with`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


def check_experts(model: PreTrainedModel, inputs_SN: Tensor, implementation: str) -> str:
    """Runs one forward pass; raises unless grouped matrix products do the experts' work."""
    with _SeenOperators() as seen, torch.no_grad():
        model.eval()
        model.model(input_ids=inputs_SN, use_cache=False)
        model.train()
    grouped = sorted(name for name in seen.names if "grouped_mm" in name)
    if implementation != "eager" and not any("fallback" not in name for name in grouped):
        raise LeanMoeError(
            f"experts implementation {implementation} ran {grouped or 'a loop'} instead "
            "of torch's grouped_mm: it needs bf16 weights and a device that has the kernel"
        )
    return ", ".join(grouped) or "eager loop"


def measured_peak(device: torch.device, size: int = 8192, repeats: int = 20) -> float:
    """FLOP/s of a large dense bf16 matrix product on random data: what utilisation divides by."""
    if device.type != "cuda":
        size, repeats = 1024, 3
    a, b = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    _wait(device)
    start = time.monotonic()
    for _ in range(repeats):
        a @ b
    _wait(device)
    return 2 * size**3 * repeats / (time.monotonic() - start)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Log:
    """JSON lines in a file and a short form of them on standard error."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")

    def write(self, line: dict[str, Any]) -> None:
        """Appends one record and flushes it."""
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        short = {k: round(v, 4) if isinstance(v, float) else v for k, v in line.items()}
        print(json.dumps(short), file=sys.stderr, flush=True)


def train(
    data: Path,
    out: Path,
    settings: TrainSettings,
    *,
    device: str,
    resume: bool = False,
    max_seconds: float = math.inf,
) -> Trainer:
    """Trains until `settings.tokens` or `max_seconds`, then saves checkpoint and model."""
    started = time.monotonic()
    trainer = Trainer(data, out, settings, device)
    if resume:
        trainer.resume(out / "checkpoint.safetensors")
    log = Log(out / "log.jsonl")
    flops = count_flops(settings.model)
    peak = measured_peak(trainer.device)
    log.write(
        {
            "event": "start",
            "step": trainer.step,
            "settings": asdict(settings),
            "kernel": trainer.kernel,
            "device": _device_name(trainer.device),
            "peak_tflops": peak / 1e12,
            "flops_per_token": flops.total,
            "torch": torch.__version__,
            **describe(trainer.model),
        }
    )
    loop(trainer, log, started, max_seconds, flops.total / peak)
    seconds = time.monotonic() - started
    trainer.save(seconds)
    checkpoint.export(trainer.model, out / "model", SHARD_BYTES)
    log.write(
        {
            "event": "stop",
            "step": trainer.step,
            "tokens": trainer.tokens,
            "dev_loss": trainer.dev_loss(),
            "seconds": trainer.seconds_before + seconds,
        }
    )
    return trainer


def loop(trainer: Trainer, log: Log, started: float, max_seconds: float, full_speed: float) -> None:
    """Steps and logs; `full_speed` is the seconds a token would take at the measured peak."""
    s = trainer.settings
    _wait(trainer.device)
    mark, marked_step = time.monotonic(), trainer.step
    while trainer.tokens < s.tokens and time.monotonic() - started < max_seconds:
        seen = trainer.train_step()
        if trainer.step % s.log_every and trainer.tokens < s.tokens:
            continue
        loss = float(seen["loss"])  # waits for the device
        now = time.monotonic()
        speed = (trainer.step - marked_step) * trainer.step_tokens / (now - mark)
        line = {
            "step": trainer.step,
            "tokens": trainer.tokens,
            "loss": loss,
            "norm": float(seen["norm"]),
            "balance": float(seen["balance"]),
            "rate": rate_at(trainer.tokens, s.tokens, s.optimiser),
            "tokens_per_s": speed,
            "utilisation": speed * full_speed,
            "max_over_mean_load": [round(v, 3) for v in seen["violation"].tolist()],
        }
        if not math.isfinite(loss):
            raise LeanMoeError(f"the loss is {loss} at step {trainer.step}: lower the rate")
        if trainer.step % s.dev_every == 0:
            line["dev_loss"] = trainer.dev_loss()
        log.write(line)
        mark, marked_step = time.monotonic(), trainer.step


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    d = TrainSettings()
    parser = argparse.ArgumentParser(description="Train the reference model.")
    parser.add_argument("--data", type=Path, required=True, help="folder made by prepare")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--architecture", choices=ARCHITECTURES, default="deepseek_v3")
    parser.add_argument("--tokens", type=int, default=d.tokens)
    parser.add_argument("--sequences", type=int, default=d.sequences)
    parser.add_argument("--learning-rate", type=float, default=d.optimiser.learning_rate)
    parser.add_argument("--experts", default=d.experts)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--residual-dropout", type=float, default=d.residual_dropout)
    parser.add_argument("--max-seconds", type=float, default=math.inf)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--resume", action="store_true")
    given = parser.parse_args(arguments)
    settings = replace(
        d,
        model=ARCHITECTURES[given.architecture](),
        alpha=d.alpha if given.architecture == "deepseek_v3" else BATCH_ALPHA,
        tokens=given.tokens,
        sequences=given.sequences,
        experts=given.experts,
        compile=given.compile,
        residual_dropout=given.residual_dropout,
        optimiser=replace(d.optimiser, learning_rate=given.learning_rate),
    )
    try:
        train(
            given.data,
            given.out,
            settings,
            device=given.device,
            resume=given.resume,
            max_seconds=given.max_seconds,
        )
    except LeanMoeError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
