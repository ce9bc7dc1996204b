"""The entry point that vLLM calls in each of its processes; without LEANMOE_PLAN it does nothing.

vLLM swallows what an import raises, not what the function raises: so this file imports nothing.
"""

from __future__ import annotations


def activate() -> None:
    """Puts the plan of LEANMOE_PLAN to work in this process; raises LeanMoeError if it cannot."""
    from leanmoe.serve.plugin_options import PluginOptions

    options = PluginOptions.from_environ("vLLM")
    if options is None:
        return
    from leanmoe.serve.vllm.patch import process_plugin

    process_plugin().start(options.load_plan("vLLM"), options)
