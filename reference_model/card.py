"""Writes the model card from results files: no number in it is typed by hand.

    python -m reference_model.card                                writes README.md and loss.svg
    python -m reference_model.card --log RUN/log.jsonl --prepared DATA/prepared.json
                                                                    first renews the results

Reads results/training.json, results/data.json, results/evaluation.json and the model folder.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from leanmoe.core.errors import LeanMoeError
from leanmoe.core.files import read_json, write_json, write_text
from leanmoe.models.reference import path
from reference_model.loss_plot import loss_svg

HERE = Path(__file__).parent
RESULTS = HERE / "results"
TRAINING_SCHEMA = 1
POINTS = 300
"""Spans that the training log is averaged over for the plot."""
NAMES = {
    "novels": "novels",
    "msdocs": "Microsoft documentation",
    "peps": "PEPs",
    "textbooks": "OpenStax textbooks",
    "wikitext2": "WikiText-2 validation",
}


def summarise_log(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the card needs of a training log: the runs, the speed, a thinned loss curve."""
    starts = [line for line in lines if line.get("event") == "start"]
    stops = [line for line in lines if line.get("event") == "stop"]
    steps = [line for line in lines if "event" not in line]
    if not starts or not stops or not steps:
        raise LeanMoeError("the training log has no start, no steps or no stop: not a finished run")
    size = max(1, len(steps) // POINTS)
    spans = [steps[i : i + size] for i in range(0, len(steps), size)]
    last = stops[-1]
    return {
        "schema": TRAINING_SCHEMA,
        "device": starts[0]["device"],
        "torch": starts[0]["torch"],
        "kernel": starts[0]["kernel"],
        "settings": starts[-1]["settings"],
        "planned_tokens": [start["settings"]["tokens"] for start in starts],
        "stops": [{key: stop[key] for key in ("tokens", "seconds")} for stop in stops],
        "parameters": starts[0]["parameters"],
        "routed_expert_parameters": starts[0]["routed_expert_parameters"],
        "flops_per_token": starts[0]["flops_per_token"],
        "peak_tflops": statistics.median(start["peak_tflops"] for start in starts),
        "tokens": last["tokens"],
        "seconds": last["seconds"],
        "dev_loss": last["dev_loss"],
        "tokens_per_s": statistics.median(line["tokens_per_s"] for line in steps),
        "utilisation": statistics.median(line["utilisation"] for line in steps),
        "train_curve": [
            [span[-1]["tokens"], round(statistics.fmean(line["loss"] for line in span), 4)]
            for span in spans
        ],
        "dev_curve": [
            [line["tokens"], round(line["dev_loss"], 4)] for line in lines if "dev_loss" in line
        ],
        "max_over_mean_load": [
            round(statistics.fmean(layer), 3)
            for layer in zip(*(line["max_over_mean_load"] for line in spans[-1]), strict=True)
        ],
    }


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, first column left, the others right."""
    lines = [head, [":--", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def percent(found: dict[str, Any]) -> str:
    """An accuracy with its interval."""
    accuracy, low, high = (100 * found[key] for key in ("accuracy", "low", "high"))
    return f"{accuracy:.1f}% ({low:.1f} to {high:.1f})"


def text_section(texts: dict[str, Any]) -> str:
    """Bits per byte by file."""
    rows = [
        (
            NAMES[name],
            f"{found['bits_per_byte']:.4f}",
            f"{found['documents']:,}",
            f"{found['bytes']:,}",
        )
        for name, found in texts.items()
    ]
    perplexity = texts["wikitext2"]["perplexity_per_word"]
    words = texts["wikitext2"]["words"]
    return (
        table(("held-out text", "bits per byte", "documents", "bytes"), rows)
        + f"\n\nWikiText-2 validation perplexity per word: **{perplexity:.1f}** "
        f"({words:,} words separated by white space; the text is scored as it comes, `<unk>` and "
        "all, and no such text was trained on). Every text is scored in windows of at most the "
        "context length that see nothing before themselves."
    )


def task_section(found: dict[str, Any]) -> str:
    """The tasks at the trained k."""
    rows = [
        ("LAMBADA, last word", percent(found["lambada"]), f"{found['lambada']['items']:,}", "0%"),
    ]
    for name, title in (("piqa", "PIQA"), ("qasc", "QASC")):
        chance = f"{100 / found[name]['choices']:.1f}%"
        for key, how in (("per_byte", "log-likelihood per byte"), ("summed", "summed")):
            result = found[name][key]
            rows.append((f"{title}, {how}", percent(result), f"{result['items']:,}", chance))
    blimp = found["blimp"]
    title = f"BLiMP, {len(blimp['paradigms'])} paradigms"
    rows.append((title, percent(blimp), f"{blimp['items']:,}", "50.0%"))
    worst = sorted(blimp["paradigms"].items(), key=lambda item: item[1])
    return (
        table(("task", "accuracy (95% interval)", "items", "chance"), rows)
        + "\n\nNo examples are shown before a question. PIQA and QASC are asked as "
        "`Question: … Answer:`; QASC without its facts. LAMBADA counts a word as right when each "
        f"of its tokens is the likeliest. BLiMP ranges from {100 * worst[0][1]:.1f}% "
        f"(`{worst[0][0]}`) to {100 * worst[-1][1]:.1f}% (`{worst[-1][0]}`)."
    )


def expert_section(layers: Sequence[dict[str, Any]], first_layer: int) -> str:
    """How evenly each layer uses its experts on the held-out text."""
    rows = [
        (
            str(first_layer + index),
            f"{layer['least']:.2f}",
            f"{layer['most']:.2f}",
            f"{layer['entropy_share']:.3f}",
            str(layer["unused"]),
        )
        for index, layer in enumerate(layers)
    ]
    head = ("layer", "least used (1 = even)", "most used", "entropy share", "unused experts")
    return (
        table(head, rows) + f"\n\nOver {layers[0]['slots']:,} slots a layer, all held-out texts "
        "together. Entropy share is the entropy of expert use over its largest possible value."
    )


def k_section(by_k: Sequence[dict[str, Any]]) -> str:
    """Quality at every uniform k, paired with the trained k."""
    names = list(by_k[0]["texts"])
    change = [
        (
            str(f["k"]),
            *(
                f"{t['bits_per_byte']:.3f}"
                + (f" ({t['low']:+.3f} to {t['high']:+.3f})" if f["k"] != by_k[0]["k"] else "")
                for t in f["texts"].values()
            ),
        )
        for f in by_k
    ]
    tasks = [(str(f["k"]), percent(f["lambada"]), percent(f["blimp"])) for f in by_k]
    units = ", ".join(
        f"{NAMES[name]} {found['units']} {found['unit_is']}s"
        for name, found in by_k[0]["texts"].items()
    )
    first = by_k[0]
    return (
        table(("k", *(NAMES[name] for name in names)), change)
        + "\n\nBits per byte, and in brackets the 95% interval of the change from the trained k "
        f"(bootstrap over units, paired: {units}; of each document its first window, and where a "
        "file has too few documents, windows of the context length as passages).\n\n"
        + table(("k", "LAMBADA", "BLiMP"), tasks)
        + f"\n\nOn the first {first['lambada']['items']:,} LAMBADA passages and "
        f"{first['blimp']['items']:,} BLiMP pairs, so not the same as the full tables above."
    )


def training_section(t: dict[str, Any], data: dict[str, Any]) -> str:
    """What was trained, on how much, how fast."""
    settings, train = t["settings"], data["train"]
    optimiser = settings["optimiser"]
    overall = t["tokens"] / t["seconds"]
    planned = ", ".join(f"{tokens / 1e9:.2f}" for tokens in t["planned_tokens"])
    stops = ", ".join(f"{stop['tokens'] / 1e9:.2f}" for stop in t["stops"][:-1])
    batch = settings["sequences"] * settings["model"]["context"]
    load = ", ".join(f"{value:.2f}" for value in t["max_over_mean_load"])
    return f"""\
| | |
| :-- | :-- |
| parameters | {t["parameters"]:,}, of which {t["routed_expert_parameters"]:,} in routed experts |
| training text | {train["tokens"]:,} tokens, {train["utf8_bytes"]:,} bytes, \
{train["documents"]:,} documents |
| dev slice | {data["dev"]["tokens"]:,} tokens, {data["dev"]["documents"]:,} whole documents, \
none longer than {data["settings"]["dev_longest_characters"]:,} characters (so no novels) |
| trained on | {t["tokens"]:,} tokens: {t["tokens"] / train["tokens"]:.1f} passes, \
{batch:,} tokens a step |
| time | {t["seconds"]:,.0f} s on one {t["device"]}, set-up, compilation, dev \
passes and checkpoints included, imports not |
| speed | {t["tokens_per_s"]:,.0f} tokens/s (median), {overall:,.0f} over the whole time |
| utilisation | {100 * t["utilisation"]:.1f}% of {t["peak_tflops"]:.0f} TFLOP/s, a dense bf16 \
matrix product measured in the same runs |
| final dev loss | {t["dev_loss"]:.4f} nats per token |
| busiest expert / mean, last steps | {load} (by layer) |

Model FLOPs are {t["flops_per_token"] / 1e6:.1f} million a token: 6 for each weight of each matrix
a token meets (its {settings["model"]["top_k"]} routed experts, not all
{settings["model"]["experts"]}) plus causal attention. The model is narrow: memory traffic takes
most of the time, not arithmetic. That is why the utilisation is low.

The optimiser is AdamW on float32 masters with bf16 weights. The learning rate is
{optimiser["learning_rate"]:g}: it warms up over {optimiser["warmup_tokens"] / 1e6:.0f}M tokens,
stays flat, and decays linearly over the last {100 * optimiser["decay_share"]:.0f}%. Weight decay is
{optimiser["weight_decay"]:g}, and the gradient norm is clipped at {optimiser["clip"]:g}. Expert
load is balanced without an auxiliary loss (DeepSeek-V3 report, section 2.1.2). The bias step is
{settings["gamma"]:g}, and 0 for the last {100 * settings["gamma_off_share"]:.0f}%. A sequence-wise
loss weighs {settings["alpha"]:g}.
Training took {len(t["stops"])} runs and resumed after {stops} billion tokens. The planned total
rose from run to run ({planned} billion), as the speed became known. So the learning rate stepped up
once, a little, at the last resumption. `{t["kernel"]}` computed the experts.

![Training and dev loss over tokens](loss.svg)"""


CREDITS = """\
The weights are leanmoe's own work, under Apache-2.0 like the code. They were trained on

- public-domain novels, from COST-ELTeC's
  [ELTeC-eng](https://github.com/COST-ELTeC/ELTeC-eng) (its markup CC BY 4.0) and
  [100 English Novels](https://github.com/computationalstylistics/100_english_novels);
- Microsoft's documentation, CC BY 4.0, © Microsoft:
  [win32](https://github.com/MicrosoftDocs/win32),
  [cpp-docs](https://github.com/MicrosoftDocs/cpp-docs) and
  [PowerShell-Docs](https://github.com/MicrosoftDocs/PowerShell-Docs);
- [Python Enhancement Proposals](https://github.com/python/peps), public domain or CC0;
- two [OpenStax](https://openstax.org) textbooks, CC BY 4.0, © Rice University.

The texts were cut into tokens and otherwise left as they were. Their authors do not endorse the
weights. The weights were tested on these and never trained on them: WikiText-2 (CC BY-SA), LAMBADA
(CC BY 4.0), PIQA (AFL 3.0), QASC (CC BY 4.0), BLiMP (CC BY 4.0), and whole documents of the sources
above."""


def card(training: dict[str, Any], data: dict[str, Any], found: dict[str, Any]) -> str:
    """The whole card as Markdown."""
    m = training["settings"]["model"]
    files = sorted(file for file in path().iterdir() if file.is_file())
    size = sum(file.stat().st_size for file in files)
    return f"""\
# The leanmoe reference model

<!-- Written by `python -m reference_model.card`; edit card.py, not this file. -->

A small DeepSeek-V3-style mixture of experts that ships with leanmoe, so that everything has a
trained model to run on anywhere. It exists to be measured: it is far too small to be useful as a
language model.

`DeepseekV3ForCausalLM`: {m["layers"]} layers ({m["dense_layers"]} dense), hidden {m["hidden"]},
{m["experts"]} routed experts {m["expert_intermediate"]} wide in {m["groups"]} groups
({m["groups_used"]} used), top-{m["top_k"]}, {m["shared_experts"]} shared expert, sigmoid router
with a correction bias, {m["heads"]} heads of latent attention, vocabulary {m["vocab_size"]}
(byte-level BPE trained on the same text), context {m["context"]}. bf16, {size / 1e6:.1f} MB in all.

## Data and licences

{CREDITS}

## Training

{training_section(training, data)}

## Quality at k = {found["trained_k"]}

{text_section(found["texts"])}

{task_section(found)}

## How evenly the experts are used

{expert_section(found["expert_use"], m["dense_layers"])}

## Fewer experts: every uniform k

{k_section(found["uniform_k"])}

## Limits

{limits_section(training, data)}

## How these numbers were made

{made_section(training, found)}
"""


def limits_section(training: dict[str, Any], data: dict[str, Any]) -> str:
    """What the model is not good for."""
    return f"""\
- The text was passed {training["tokens"] / data["train"]["tokens"]:.0f} times, so some of it is
  learnt by heart and the training loss flatters. The dev slice of the loss curve holds no novels;
  the held-out novels above are the test of those.
- PIQA and QASC are near chance: the model has next to no knowledge of the world. WikiText-2 is of
  a kind it never saw.
- The model knows English alone, of old novels and technical documentation. It had no instruction
  tuning and no safety tuning: do not put its output before people."""


def made_section(training: dict[str, Any], found: dict[str, Any]) -> str:
    """Machines, versions and commands."""
    made = found["provenance"]
    return f"""\
| | |
| :-- | :-- |
| evaluated on | {made["hardware"]}, {made["date"]} |
| with | torch {made["versions"]["torch"]}, Transformers {made["versions"]["transformers"]}, \
{found["dtype"]}, experts `{found["experts_implementation"]}`, seed {made["seed"]} |
| commit | {made["commit"]}, of the last of its runs: an interrupted evaluation goes on |
| trained on | {training["device"]}, torch {training["torch"]} |

```
python -m reference_model.prepare TEXT --out DATA
python -m reference_model.train --data DATA --out RUN --compile
python -m reference_model.evaluate --data EVAL
python -m reference_model.card --log RUN/log.jsonl --prepared DATA/prepared.json
```"""


def write_card(results: Path, out: Path) -> None:
    """README.md and loss.svg in `out`, from the three results files."""
    training, data, found = (
        read_json(results / f"{name}.json", f"{name} results")
        for name in ("training", "data", "evaluation")
    )
    wanted = ("texts", "lambada", "piqa", "qasc", "blimp", "expert_use", "uniform_k")
    missing = [part for part in wanted if part not in found]
    if missing:
        raise LeanMoeError(
            f"{results / 'evaluation.json'} lacks {', '.join(missing)}: the evaluation was not "
            "finished; run python -m reference_model.evaluate"
        )
    write_text(out / "loss.svg", loss_svg(training["train_curve"], training["dev_curve"]))
    write_text(out / "README.md", card(training, data, found))


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Write the reference model's card.")
    parser.add_argument("--log", type=Path, help="a training log to summarise first")
    parser.add_argument("--prepared", type=Path, help="a prepared.json to take over first")
    given = parser.parse_args(arguments)
    try:
        if given.log:
            lines = [json.loads(line) for line in given.log.read_text().splitlines()]
            write_json(RESULTS / "training.json", summarise_log(lines))
        if given.prepared:
            write_json(RESULTS / "data.json", read_json(given.prepared, "prepared data"))
        write_card(RESULTS, HERE)
    except (LeanMoeError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
