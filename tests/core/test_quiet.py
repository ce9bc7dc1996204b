"""Libraries below are silent for as long as they are asked to be."""

from __future__ import annotations

import logging

import pytest

from leanmoe.core.quiet import quiet_loggers, quiet_transformers


def test_loggers_get_their_own_level_back_after_an_exception_too() -> None:
    logger = logging.getLogger("a library")
    logger.setLevel(logging.INFO)

    def fail() -> None:
        with quiet_loggers("a library"):
            assert logger.level == logging.ERROR
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert logger.level == logging.INFO


def test_transformers_shows_no_bars_and_no_remarks() -> None:
    from transformers.utils import logging as transformers_logging

    quiet_transformers()
    assert transformers_logging.get_verbosity() == transformers_logging.ERROR
    assert not transformers_logging.is_progress_bar_enabled()
