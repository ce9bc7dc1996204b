"""Text to tokens and back."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from leanmoe.core.errors import LeanMoeError
from reference_model.prepare import (
    SEPARATOR,
    PrepareSettings,
    pack,
    prepare,
    split_documents,
    train_tokenizer,
    unpack,
)

DOCUMENTS = [
    f"Document {i}: the café's 1234567 bytes\n\n    if x:  # naïve\n\treturn {i}" for i in range(40)
]


def text_of(documents: list[str]) -> str:
    return "".join(f"{document}\n{SEPARATOR}\n" for document in documents)


def test_documents_are_split_at_separator_lines_only() -> None:
    inline = f"a line that mentions {SEPARATOR} stays whole"
    text = text_of(["one\n\ntwo", "   ", inline]) + "no separator after the last"
    assert split_documents(text) == ["one\n\ntwo", inline, "no separator after the last"]
    assert split_documents("") == []


def test_packing_round_trip_and_separator_id() -> None:
    tokenizer = train_tokenizer(DOCUMENTS, 300)
    parts = pack(tokenizer, DOCUMENTS, batch=7)
    assert all(part[0] == 0 and (part[1:] != 0).all() for part in parts)
    assert unpack(tokenizer, np.concatenate(parts)) == DOCUMENTS


def test_prepare_writes_a_folder_that_transformers_reads(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(text_of(DOCUMENTS), encoding="utf-8")
    settings = PrepareSettings(vocab_size=300, dev_tokens=100)
    report = prepare(text, tmp_path / "out", settings)
    train = np.fromfile(tmp_path / "out" / "train.bin", dtype="<u2")
    dev = np.fromfile(tmp_path / "out" / "dev.bin", dtype="<u2")
    assert report["train"]["documents"] + report["dev"]["documents"] == len(DOCUMENTS)
    assert (train.size, dev.size) == (report["train"]["tokens"], report["dev"]["tokens"])
    assert json.loads((tmp_path / "out" / "prepared.json").read_text()) == report
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert ids == (0, 0, 0)
    assert tokenizer.decode(tokenizer.encode(DOCUMENTS[3])) == DOCUMENTS[3]
    again = prepare(text, tmp_path / "again", settings, tmp_path / "out" / "tokenizer.json")
    assert again == report
    with pytest.raises(LeanMoeError, match="cannot read tokenizer"):
        prepare(text, tmp_path / "again", settings, tmp_path / "none.json")


def test_errors_name_the_value(tmp_path: Path) -> None:
    with pytest.raises(LeanMoeError, match="vocab_size is 10"):
        train_tokenizer(DOCUMENTS, 10)
    with pytest.raises(LeanMoeError, match="cannot read text"):
        prepare(tmp_path / "absent.txt", tmp_path, PrepareSettings())
    short = tmp_path / "short.txt"
    short.write_text("one document")
    with pytest.raises(LeanMoeError, match="too few to hold"):
        prepare(short, tmp_path / "out", PrepareSettings(vocab_size=257))
