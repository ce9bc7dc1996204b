"""The entry points that vLLM calls in each of its processes; without LEANMOE_PLAN they do nothing.

One puts a plan of one level into the models that a process builds. The other lets requests name
tiers and load change levels. vLLM swallows what an import raises, not what the functions raise: so
this file imports nothing.
"""

from __future__ import annotations


def activate() -> None:
    """Puts a plan of one level to work in this process; raises LeanMoeError if it cannot."""
    from leanmoe.core.installed_vllm import check_plugin
    from leanmoe.serve.plugin_options import PluginOptions

    options = PluginOptions.from_environ("vLLM")
    if options is None:
        return
    check_plugin()
    if options.has_tiers:
        return
    from leanmoe.serve.vllm.patch import process_plugin

    process_plugin().start(options.load_plan("vLLM"), options)


def control() -> None:
    """Checks which tiers requests name, and where they may puts their levels to work, too.

    Raises LeanMoeError if this vLLM cannot.
    """
    from leanmoe.serve.plugin_options import PluginOptions

    options = PluginOptions.from_environ("vLLM")
    if options is None:
        return
    from leanmoe.serve.vllm.control_hooks import process_control

    process_control().start(options)
