"""The packed token stream on the device: training windows in a seeded order, the dev windows."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from leanmoe.core.errors import LeanMoeError


def load_stream(path: Path, vocab_size: int, device: torch.device) -> tuple[Tensor, str]:
    """A .bin file of uint16 ids as an int32 tensor on `device`, and its sha256."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise LeanMoeError(
            f"cannot read packed tokens {path}: {error.strerror}; "
            "make them with python -m reference_model.prepare"
        ) from error
    if len(raw) % 2 or not raw:
        raise LeanMoeError(f"{path} is {len(raw)} bytes: not a stream of uint16 ids")
    ids = np.frombuffer(raw, dtype="<u2")
    if int(ids.max()) >= vocab_size:
        raise LeanMoeError(f"{path} holds id {ids.max()}; the model's vocab_size is {vocab_size}")
    return torch.from_numpy(ids.astype(np.int32)).to(device), hashlib.sha256(raw).hexdigest()


class Windows:
    """Every epoch cuts the stream at another offset and shuffles the windows; both are seeded."""

    def __init__(self, ids: Tensor, length: int, seed: int) -> None:
        self.ids, self.length, self.seed = ids, length, seed
        self.per_epoch = (ids.numel() - 1) // length - 1
        if self.per_epoch < 1:
            raise LeanMoeError(
                f"the stream has {ids.numel()} tokens; windows of {length} need {2 * length + 1}"
            )
        self._epoch = -1
        self._starts = np.empty(0, dtype=np.int64)
        self._span = torch.arange(length + 1, device=ids.device)

    def _start(self, index: int) -> int:
        epoch, place = divmod(index, self.per_epoch)
        if epoch != self._epoch:
            draw = np.random.default_rng((self.seed, epoch))
            offset = int(draw.integers(0, self.length))
            self._starts = offset + self.length * draw.permutation(self.per_epoch)
            self._epoch = epoch
        return int(self._starts[place])

    def batch(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Inputs and next-token targets (S,N), windows `first` to `first + count` of the order."""
        starts = torch.tensor([self._start(i) for i in range(first, first + count)])
        starts = starts.to(self.ids.device, non_blocking=True)
        window = self.ids[starts[:, None] + self._span].long()
        return window[:, :-1], window[:, 1:]


def dev_batches(ids: Tensor, length: int, count: int) -> list[tuple[Tensor, Tensor]]:
    """The dev stream's windows in order, in whole batches: compiled code then sees one shape."""
    count = min(count, (ids.numel() - 1) // length)
    if count < 1:
        raise LeanMoeError(f"the dev stream has {ids.numel()} tokens; {length + 1} are needed")
    windows = (ids.numel() - 1) // length // count * count
    inputs = ids[: windows * length].view(windows, length).long()
    targets = ids[1 : windows * length + 1].view(windows, length).long()
    shape = (windows // count, count, length)
    return list(zip(inputs.view(shape), targets.view(shape), strict=True))
