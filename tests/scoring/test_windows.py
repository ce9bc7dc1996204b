"""Documents cut into windows, and windows put together in batches."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from leanmoe.core.errors import LeanMoeError
from leanmoe.core.text import Document
from leanmoe.scoring.windows import MINIMUM_WINDOW_TOKENS, Windows, cut

START = 7


class Characters:
    """A tokenizer with a token for each character."""

    bos_token_id = START

    def __call__(self, text: str, **_settings: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(character) for character in text]}


class CharactersWithoutStart(Characters):
    bos_token_id = None  # type: ignore[assignment]


def documents(lengths: list[int]) -> list[Document]:
    return [
        Document(f"d{n}", "".join(chr(1000 + 100 * n + i % 97) for i in range(length)))
        for n, length in enumerate(lengths)
    ]


def tokens_of(windows: Windows) -> Counter[int]:
    return Counter(windows.ids_SN[windows.mask].tolist())


def test_every_token_of_long_documents_is_in_one_window() -> None:
    texts = documents([63, 31, 200])
    windows = cut(texts, CharactersWithoutStart(), length=32)
    assert tokens_of(windows)[1000] == 1
    # 200 = 6 x 32 + 8, and a last piece of 8 is too short to predict from.
    assert windows.tokens == 63 + 31 + 192
    assert sorted(windows.lengths_S.tolist()) == [31, 31, *[32] * 7]


def test_a_document_starts_with_the_tokenizers_start() -> None:
    windows = cut(documents([40]), Characters(), length=64)
    assert windows.ids_SN[0, :2].tolist() == [START, 1000]
    assert windows.tokens == 41


def test_tokens_are_spread_over_as_many_documents_as_possible() -> None:
    windows = cut(documents([3200, 32, 32, 3200]), CharactersWithoutStart(), 32, tokens=32 * 6)
    assert Counter(windows.documents_S.tolist()) == Counter({0: 2, 1: 1, 2: 1, 3: 2}) or sorted(
        Counter(windows.documents_S.tolist()).values()
    ) == [1, 1, 2, 2]
    assert windows.tokens == 32 * 6


def test_the_same_seed_cuts_the_same_windows() -> None:
    texts = documents([100] * 20)
    one, same, other = (cut(texts, Characters(), 32, 500, seed) for seed in (0, 0, 1))
    assert one.names == same.names
    assert torch.equal(one.ids_SN, same.ids_SN)
    assert one.names != other.names


def test_text_without_a_long_enough_document_is_refused() -> None:
    with pytest.raises(LeanMoeError, match="none of its 2 documents has 16 tokens"):
        cut(documents([3, MINIMUM_WINDOW_TOKENS - 1]), CharactersWithoutStart(), 32)
    with pytest.raises(LeanMoeError, match="none of its 0 documents"):
        cut([], Characters(), 32)


def test_a_window_length_out_of_range_is_named() -> None:
    with pytest.raises(LeanMoeError, match="window length is 8 tokens"):
        cut(documents([100]), Characters(), length=8)


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(16, 150), min_size=1, max_size=12),
    batch_tokens=st.integers(1, 400),
    decode_batch=st.one_of(st.none(), st.integers(1, 6)),
)
def test_every_window_is_scored_once(
    lengths: list[int], batch_tokens: int, decode_batch: int | None
) -> None:
    windows = cut(documents(lengths), CharactersWithoutStart(), 32)
    count = len(windows.lengths_S)
    if decode_batch is not None and count < decode_batch:
        with pytest.raises(LeanMoeError, match=f"decode_batch is {decode_batch}"):
            windows.batches(batch_tokens, decode_batch)
        return
    batches = windows.batches(batch_tokens, decode_batch)
    scored = [int(row) for b in batches for row in b.rows_S[b.scored_S]]
    assert sorted(scored) == list(range(count))
    assert sum(batch.tokens for batch in batches) == windows.tokens
    predicted = sum(int(batch.predicted.sum()) for batch in batches)
    assert predicted == windows.tokens - count
    for batch in batches:
        assert len(batch.rows_S) % (decode_batch or 1) == 0
        for start in range(0, len(batch.rows_S), decode_batch or 1):
            group = batch.rows_S[start : start + (decode_batch or 1)].tolist()
            assert len(set(group)) == len(group), "a window shared a step with itself"
        rows = batch.rows_S
        assert torch.equal(batch.mask_SN.sum(1), windows.lengths_S[rows])
        assert torch.equal(batch.ids_SN[batch.mask_SN], windows.ids_SN[rows][windows.mask[rows]])


def test_windows_of_a_document_decode_with_those_of_others() -> None:
    windows = cut(documents([32 * 4] * 8), CharactersWithoutStart(), 32)
    batches = windows.batches(decode_batch=4)
    rows = torch.cat([batch.rows_S for batch in batches]).view(-1, 4)
    documents_SB = windows.documents_S[rows]
    repeated = sum(4 - len(set(step)) for step in documents_SB.tolist())
    # By chance alone, 4 of 8 documents' windows would repeat a document 5 times in these 8 steps.
    assert repeated <= 3


def test_the_prompt_is_not_scored() -> None:
    windows = Windows.of_ids(torch.arange(20).view(2, 10)).after_prompt(6)
    (batch,) = windows.batches()
    assert batch.predicted.sum(1).tolist() == [3, 3]
    assert batch.predicted[0].nonzero().flatten().tolist() == [6, 7, 8]
    with pytest.raises(LeanMoeError, match="prompt is 9 tokens: it must be 0 to 8"):
        windows.after_prompt(9)


def test_full_windows_need_no_attention_mask() -> None:
    (batch,) = Windows.of_ids(torch.ones((3, 16), dtype=torch.int64)).batches()
    assert batch.attention_mask is None
    mixed = cut(documents([32, 20]), CharactersWithoutStart(), 32)
    (padded,) = mixed.batches()
    assert padded.attention_mask is not None
    assert padded.attention_mask.sum().item() == 52


def test_windows_of_several_texts_are_joined_with_their_sources() -> None:
    one = Windows.of_ids(torch.arange(40).reshape(2, 20), ["a", "b"])
    other = replace(Windows.of_ids(torch.arange(60).reshape(3, 20)), sources=("s", "s", "t"))
    both = Windows.joined([one, other])
    assert both.documents_S.tolist() == [0, 1, 2, 3, 4]
    assert both.sources == ("a", "b", "s", "s", "t")
    assert (both.documents, both.units, both.tokens) == (5, 4, 100)
