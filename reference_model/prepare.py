"""Text to tokens: trains a byte-level BPE, packs every document, holds some back.

    python -m reference_model.prepare TEXT --out DATA [--vocab-size 7936 | --tokenizer FILE]

`TEXT` is one UTF-8 file; each document ends with a line that reads `<|endoftext|>`. `DATA` gets

    tokenizer.json, tokenizer_config.json   loadable by Transformers as PreTrainedTokenizerFast
    train.bin, dev.bin                      little-endian uint16 ids; `<|endoftext|>` (id 0)
                                            goes before every document
    prepared.json                           counts, sizes and sha256 of the above
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from leanmoe.core.errors import LeanMoeError
from leanmoe.core.files import write_json, write_text, write_with

SEPARATOR = "<|endoftext|>"
SEPARATOR_ID = 0
PREPARED_SCHEMA = 1

# Llama 3's split: contractions, words with one leading mark, numbers by threes, marks, spaces.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

Ids = npt.NDArray[np.uint16]


@dataclass(frozen=True)
class PrepareSettings:
    """How text becomes tokens."""

    vocab_size: int = 7936
    dev_tokens: int = 262_144
    """At least this many tokens of whole documents are kept out of training."""
    dev_longest_characters: int = 200_000
    """Longer documents (whole novels) never go to the dev slice: one would fill it."""
    seed: int = 0
    batch: int = 256
    """Documents encoded at a time."""


def split_documents(text: str) -> list[str]:
    """The documents of `text`, without the separator lines and the blank lines around them."""
    lines = f"\n{text}"
    documents = (part.strip("\n") for part in lines.split(f"\n{SEPARATOR}\n"))
    return [document for document in documents if document.strip()]


def train_tokenizer(documents: Sequence[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE with `<|endoftext|>` as id 0; every byte is in its alphabet."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + 1 or vocab_size > 2**16:
        raise LeanMoeError(f"vocab_size is {vocab_size}; allowed are {len(alphabet) + 1} to 65536")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[SEPARATOR],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer, length=len(documents))
    if tokenizer.token_to_id(SEPARATOR) != SEPARATOR_ID:
        raise LeanMoeError(f"{SEPARATOR} is not id {SEPARATOR_ID} in the trained tokenizer")
    return tokenizer


def read_tokenizer(path: Path) -> Tokenizer:
    """A tokenizer that exists; refused if its separator is not the one documents begin with."""
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises this class itself
        raise LeanMoeError(f"cannot read tokenizer {path}: {error}") from error
    if tokenizer.token_to_id(SEPARATOR) != SEPARATOR_ID:
        raise LeanMoeError(f"{SEPARATOR} is not id {SEPARATOR_ID} in the tokenizer {path}")
    return tokenizer


def pack(tokenizer: Tokenizer, documents: Sequence[str], batch: int) -> list[Ids]:
    """Each document's ids, `<|endoftext|>` in front."""
    packed: list[Ids] = []
    for start in range(0, len(documents), batch):
        for encoding in tokenizer.encode_batch_fast(list(documents[start : start + batch])):
            packed.append(np.array([SEPARATOR_ID, *encoding.ids], dtype="<u2"))
    return packed


def unpack(tokenizer: Tokenizer, stream: Ids) -> list[str]:
    """The documents of a packed stream; the inverse of `pack` then concatenate."""
    starts = np.flatnonzero(stream == SEPARATOR_ID)
    parts = np.split(stream, starts)[1:]
    return [tokenizer.decode(part[1:].tolist(), skip_special_tokens=False) for part in parts]


def choose_dev(
    documents: Sequence[str], sizes: Sequence[int], settings: PrepareSettings
) -> set[int]:
    """Indices of whole documents to keep out of training, drawn with the seed."""
    chosen: set[int] = set()
    tokens = 0
    for index in np.random.default_rng(settings.seed).permutation(len(documents)).tolist():
        if tokens >= settings.dev_tokens:
            break
        if len(documents[index]) <= settings.dev_longest_characters:
            chosen.add(index)
            tokens += sizes[index]
    if not chosen or len(chosen) == len(documents):
        raise LeanMoeError(
            f"the text has {len(documents)} documents and {sum(sizes)} tokens: too few to hold "
            f"{settings.dev_tokens} tokens of whole documents back"
        )
    return chosen


def prepare(
    text_file: Path, out: Path, settings: PrepareSettings, tokenizer_file: Path | None = None
) -> dict[str, Any]:
    """Writes the whole data folder; returns what prepared.json says.

    `tokenizer_file` is the tokenizer.json of another model, so that losses can be compared; not
    set, one is trained.
    """
    try:
        text = text_file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LeanMoeError(f"cannot read text {text_file}: {error}") from error
    documents = split_documents(text)
    del text
    if not documents:
        raise LeanMoeError(f"{text_file} holds no documents")
    print(f"{len(documents)} documents", file=sys.stderr, flush=True)
    if tokenizer_file is None:
        tokenizer = train_tokenizer(documents, settings.vocab_size)
    else:
        tokenizer = read_tokenizer(tokenizer_file)
        settings = replace(settings, vocab_size=tokenizer.get_vocab_size())
    write_tokenizer(tokenizer, out)
    print("packing", file=sys.stderr, flush=True)
    packed = pack(tokenizer, documents, settings.batch)
    dev = choose_dev(documents, [len(ids) for ids in packed], settings)
    slices = {
        "train": [i for i in range(len(packed)) if i not in dev],
        "dev": sorted(dev),
    }
    report: dict[str, Any] = {"schema": PREPARED_SCHEMA, "settings": asdict(settings)}
    for name, indices in slices.items():
        report[name] = write_stream(out / f"{name}.bin", (packed[i] for i in indices)) | {
            "documents": len(indices),
            "utf8_bytes": sum(len(documents[i].encode()) for i in indices),
        }
    write_json(out / "prepared.json", report)
    return report


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """tokenizer.json without indentation (a third smaller) and the settings Transformers reads."""
    write_text(folder / "tokenizer.json", tokenizer.to_str(pretty=False))
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": SEPARATOR,
            "eos_token": SEPARATOR,
            "pad_token": SEPARATOR,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 1024,
        },
    )


def write_stream(path: Path, parts: Iterable[Ids]) -> dict[str, Any]:
    """Writes the ids end to end; returns their number and sha256."""
    stream = np.concatenate(list(parts)).astype("<u2")
    write_with(path, stream.tofile)
    return {"tokens": int(stream.size), "sha256": hashlib.sha256(stream.tobytes()).hexdigest()}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; flags default to PrepareSettings."""
    defaults = PrepareSettings()
    parser = argparse.ArgumentParser(description="Train a tokenizer on text and pack the text.")
    parser.add_argument("text", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--vocab-size", type=int, default=defaults.vocab_size)
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json to use; not set: train one")
    parser.add_argument("--dev-tokens", type=int, default=defaults.dev_tokens)
    parser.add_argument("--seed", type=int, default=defaults.seed)
    given = parser.parse_args(arguments)
    settings = PrepareSettings(
        vocab_size=given.vocab_size, dev_tokens=given.dev_tokens, seed=given.seed
    )
    try:
        print(prepare(given.text, given.out, settings, given.tokenizer))
    except LeanMoeError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
