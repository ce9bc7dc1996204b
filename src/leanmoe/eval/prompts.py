"""Prompts from a file of JSON lines: {"prompt": ...} or {"question": ..., "answer": ...}."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from leanmoe.core.errors import LeanMoeError
from leanmoe.core.files import read_json_lines
from leanmoe.eval.settings import EvalSettings
from leanmoe.stats.replies import NUMBER, answer_in, compiled

FEWEST_PROMPTS = 10


class Encoder:
    """A model's tokenizer; sequences start with its start token, or its end token if it has none.

    Raises LeanMoeError when it has neither.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        start = tokenizer.bos_token_id
        start = tokenizer.eos_token_id if start is None else start
        if start is None:
            raise LeanMoeError("the tokenizer has no start and no end token to start a text with")
        self.start_id = int(start)
        self.context = int(getattr(model.config, "max_position_embeddings", None) or 2048)
        """Tokens that the model reads at most."""
        self._tokenizer = tokenizer

    def encode(self, text: str) -> list[int]:
        """Token ids, with nothing added in front."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False, verbose=False)
        return ids


@dataclass(frozen=True)
class Prompt:
    """A text to write on from, and the answer that the reply should hold, if there is one."""

    ids: tuple[int, ...]
    answer: str | None
    pattern: str = NUMBER

    def is_right(self, reply: str) -> bool:
        """Whether the last answer in the reply is the right one."""
        return answer_in(reply, compiled(self.pattern)) == self.answer


def prompts_of(model: Any, tokenizer: Any, settings: EvalSettings) -> tuple[Prompt, ...]:
    """The run's prompts; raises LeanMoeError as `read_prompts` does."""
    path = Path(str(settings.prompts))
    return read_prompts(path, Encoder(model, tokenizer), settings.output_len, settings.limit)


def read_prompts(
    path: Path, encoder: Encoder, new_tokens: int, limit: int | None = None
) -> tuple[Prompt, ...]:
    """The file's prompts, its first `limit`. A line may hold its own "pattern" of answers.

    An answer is what its pattern finds last in it (GSM8K's stand after ####), or all of it.
    Raises LeanMoeError, naming the line, for one that is not as it must be, and for a prompt that
    with its reply is longer than the model reads.
    """
    found: list[Prompt] = []
    for where, value in islice(read_json_lines(path, "prompts"), limit):
        prompt = _prompt(value, encoder, where)
        if len(prompt.ids) + new_tokens > encoder.context:
            raise LeanMoeError(
                f"{where} has {len(prompt.ids)} tokens: with {new_tokens} of a reply that is more "
                f"than the model reads ({encoder.context})"
            )
        found.append(prompt)
    if len(found) < FEWEST_PROMPTS:
        raise LeanMoeError(
            f"{path} gives {len(found)} prompts: at least {FEWEST_PROMPTS} are needed to judge by"
        )
    if len({prompt.answer is None for prompt in found}) > 1:
        raise LeanMoeError(f"{path}: some prompts have an answer and some have none")
    return tuple(found)


def _prompt(value: dict[str, Any], encoder: Encoder, where: str) -> Prompt:
    text, answer = value.get("prompt", value.get("question")), value.get("answer")
    if not isinstance(text, str) or not text:
        raise LeanMoeError(f"{where} has no text in 'prompt' or 'question'")
    if answer is not None and not isinstance(answer, str):
        raise LeanMoeError(f"{where}: 'answer' must be a text")
    pattern = value.get("pattern", NUMBER)
    if not isinstance(pattern, str):
        raise LeanMoeError(f"{where}: 'pattern' must be a text")
    if answer is not None:
        answer = answer_in(answer, compiled(pattern)) or answer.strip()
    ids = tuple(encoder.encode(text))
    start = () if ids[:1] == (encoder.start_id,) else (encoder.start_id,)  # templates write it
    return Prompt((*start, *ids), answer, pattern)
