"""What a request is checked for, and which functions of vLLM are fit to be wrapped."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from leanmoe.core.errors import LeanMoeError
from leanmoe.serve.plugin_options import PluginOptions
from leanmoe.serve.tiers import BadRequestError
from leanmoe.serve.vllm.control_hooks import ControlHooks, check_request, check_signature
from tests.serve.test_tiers import PLAN, TIERS


def test_a_limit_that_is_none_is_refused_before_a_model_is_loaded(tmp_path: Path) -> None:
    PLAN.save(tmp_path / "plan.json")
    with pytest.raises(LeanMoeError, match="no unit"):
        ControlHooks().start(PluginOptions(str(tmp_path / "plan.json"), slo="tpot=30"))


def request(arguments: Any = None, salt: str | None = None) -> Any:
    parameters = SimpleNamespace(extra_args=arguments)
    return SimpleNamespace(sampling_params=parameters, cache_salt=salt)


def test_a_request_is_checked_where_a_plan_is_at_work() -> None:
    check_request(TIERS, request())
    check_request(TIERS, request({"leanmoe_tier": "fast"}, "mine"))
    check_request(TIERS, SimpleNamespace(sampling_params=None, cache_salt=None))
    with pytest.raises(BadRequestError, match="leanmoe_tier is 'economy'"):
        check_request(TIERS, request({"leanmoe_tier": "economy"}))
    with pytest.raises(BadRequestError, match="cache_salt"):
        check_request(TIERS, request(salt="leanmoe-0123"))
    check_request(None, request({"leanmoe_tier": "economy"}))


def test_functions_with_other_arguments_are_refused() -> None:
    def process(params: Any) -> None: ...

    check_signature(process, "params")
    with pytest.raises(LeanMoeError, match="process takes no request: tiers cannot run there"):
        check_signature(process, "request")
