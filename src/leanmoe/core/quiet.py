"""Keeps the loading bars and remarks of the libraries below off the screen."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


def quiet_transformers() -> None:
    """For the rest of the process: no progress bars and no remarks of Transformers and numba."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("numba").setLevel(logging.WARNING)


@contextmanager
def quiet_loggers(*names: str, level: int = logging.ERROR) -> Iterator[None]:
    """Within the block the loggers say nothing below `level`."""
    loggers = [logging.getLogger(name) for name in names]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(level)
    try:
        yield
    finally:
        for logger, own in zip(loggers, before, strict=True):
            logger.setLevel(own)
