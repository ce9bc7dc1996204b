"""How long does a prompt take under a plan, beside what the rows that it leaves would take?

A plan that keeps k' of a token's K slots leaves k'/K of the experts' rows. What so many rows take
is measured with vLLM's own routing, top_k = 1 to K of the same logits, and read between whole k by
a straight line. Two times are taken: that of a whole prompt of one request, all of the engine's
work included, and that of all MoE layers alone, routing and experts, captured and replayed.

Letters: T tokens (rows of a step), K slots of a token.
"""

from __future__ import annotations

import random
import time
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.vllm.step_results import interval
from benchmarks.vllm.variants import STOCK, Variant, variants_of

TIMES = ("layers_ms", "prompt_ms")


def variants(run: Any) -> list[Variant]:
    """Stock, each top_k below the model's own, and the plans that are asked for."""
    top_k = run.shape.fingerprint().top_k
    baseline = "; ".join(f"top_k={k}: top_k={k}" for k in range(1, top_k))
    found = variants_of(run.shape, f"{baseline}; {run.options.prefill_plans}", ["auto"], ["vllm"])
    return [each for each in found if each.name == STOCK or not (each.plan and is_empty(each))]


def is_empty(variant: Variant) -> bool:
    """Whether a variant's plan changes nothing."""
    assert variant.plan is not None
    return all(rule.is_empty for band in variant.plan.bands for rule in band.rules)


def measure(run: Any, engine: Any) -> None:
    """Every size under every variant, in turn; the entries are added to the run's results."""
    sizes = [int(part) for part in run.options.prefill.split(",") if part]
    wanted = [engine.settled(variant) for variant in variants(run)] if sizes else []
    for variant in wanted:
        engine.put(variant)
    was_complete = run.is_complete
    layers = MoeLayers(engine, int(run.config["hidden_size"]))
    for tokens in sizes:
        engine.replay.draw("skewed", seed=tokens)
        times: dict[str, dict[str, list[float]]] = {name: {} for name in TIMES}
        seen = {variant.name: layers.chosen(variant.name, tokens) for variant in wanted}
        for number in range(run.options.prefill_rounds + 1):  # the first compiles
            for variant in random.Random(number).sample(wanted, len(wanted)):
                found = layers.seconds(variant.name, tokens, run.options.replays)
                whole = prompt_seconds(engine, variant.name, tokens)
                if number:
                    times["layers_ms"].setdefault(variant.name, []).append(found * 1e3)
                    times["prompt_ms"].setdefault(variant.name, []).append(whole * 1e3)
        run.prefill += entries(tokens, times, seen, run.shape.fingerprint().top_k)
        run.say(f"prompts of {tokens} tokens measured")
        run.write(is_complete=was_complete and tokens == sizes[-1])
        layers.forget()


class MoeLayers:
    """All MoE layers of an engine, one after the other and of the same rows, without the rest."""

    def __init__(self, engine: Any, width: int) -> None:
        """`width` is the hidden width D."""
        self._engine, self._width = engine, width
        self._graphs: dict[tuple[str, int], Any] = {}
        self._rows: dict[int, Tensor] = {}

    def chosen(self, variant: str, rows: int) -> tuple[float, float]:
        """Slots kept a token and distinct experts of a step of so many rows, means over layers."""
        self._engine.replay.variant = variant
        with torch.inference_mode():
            routed = self._run(self._hidden(rows))
        kept = [float((weights != 0).sum()) / rows for _, weights in routed]
        distinct = [len(torch.unique(ids[weights != 0])) for ids, weights in routed]
        return float(np.mean(kept)), float(np.mean(distinct))

    def seconds(self, variant: str, rows: int, replays: int) -> float:
        """Seconds of a step of so many rows; captured and replayed where there is a GPU."""
        self._engine.replay.variant = variant
        hidden_TD = self._hidden(rows)

        def run() -> None:
            self._run(hidden_TD)

        with torch.inference_mode():
            if not torch.cuda.is_available():
                return float(self._engine.replayed(run, replays))
            key = (variant, rows)
            if key not in self._graphs:
                run()
                self._engine.wait()
                self._graphs[key] = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self._graphs[key]):
                    run()
            return float(self._engine.replayed(self._graphs[key].replay, replays))

    def forget(self) -> None:
        """Frees what was captured, and the rows that it reads."""
        self._graphs.clear()
        self._rows.clear()

    def _run(self, hidden_TD: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The ids and weights (T,K) of each layer, whose experts are computed."""
        routed = []
        logits_TE = hidden_TD.new_zeros(len(hidden_TD), self._engine.replay.experts)
        for layer in self._engine.moe_layers:
            method = layer.routed_experts.quant_method
            weights, ids = layer.router.select_experts(
                hidden_states=hidden_TD,
                router_logits=logits_TE,
                topk_indices_dtype=method.topk_indices_dtype,
                input_ids=None,
            )
            method.apply(layer.routed_experts, hidden_TD, weights, ids, None, None)
            routed.append((ids, weights))
        return routed

    def _hidden(self, rows: int) -> Tensor:
        """The same drawn rows (T,D) for every variant; kept, since captured steps read them."""
        if rows not in self._rows:
            self._rows[rows] = self._drawn(rows)
        return self._rows[rows]

    def _drawn(self, rows: int) -> Tensor:
        where = self._engine.moe_layers[0].routed_experts.w13_weight.device
        generator = torch.Generator(device=where).manual_seed(rows)
        drawn_TD = torch.randn(rows, self._width, generator=generator, device=where)
        return drawn_TD.to(torch.bfloat16)


def prompt_seconds(engine: Any, variant: str, tokens: int) -> float:
    """Seconds of one prompt of so many tokens and its first reply token."""
    engine.replay.variant = variant
    engine.add_prompt(tokens)
    engine.wait()
    started = time.perf_counter()
    engine.finish()
    engine.wait()
    return time.perf_counter() - started


def entries(
    tokens: int,
    times: dict[str, dict[str, list[float]]],
    seen: dict[str, tuple[float, float]],
    top_k: int,
) -> list[dict[str, Any]]:
    """One entry a variant: its times, slots kept and distinct experts, and beside the rows left."""
    baseline = {k: STOCK if k == top_k else f"top_k={k}" for k in range(1, top_k + 1)}
    found = []
    for variant, (kept, distinct) in seen.items():
        entry: dict[str, Any] = {
            "tokens": tokens, "plan": variant, "kept": round(kept, 3), "distinct": distinct,
        }  # fmt: skip
        for name, by_variant in times.items():
            medians = [median(by_variant[baseline[k]]) for k in sorted(baseline)]
            rows_left = float(np.interp(kept, sorted(baseline), medians))
            entry[name] = interval(by_variant[variant])
            entry[f"gain_{name}"] = round(medians[-1] / median(by_variant[variant]), 4)
            entry[f"over_rows_left_{name}"] = round(median(by_variant[variant]) / rows_left, 4)
        found.append(entry)
    return found


def show(found: list[dict[str, Any]]) -> None:
    """The table on screen; nothing where there is nothing."""
    for name in TIMES if found else ():
        print(f"\nprefill, {name}: gain over stock, over the time of the rows left")
        heads = ("distinct", name, "gain", "over")
        print(f"{'tokens':>7} {'plan':24} {'kept':>6}", *(f"{head:>10}" for head in heads))
        for entry in found:
            print(
                f"{entry['tokens']:>7} {entry['plan']:24} {entry['kept']:>6.2f} "
                f"{entry['distinct']:>10.1f} {entry[name]['median']:>10.4g} "
                f"{entry[f'gain_{name}']:>9.2f}x {entry[f'over_rows_left_{name}']:>10.3f}"
            )
