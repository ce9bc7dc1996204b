"""The entry point that SGLang calls in each of its processes; without LEANMOE_PLAN it does nothing.

SGLang swallows what a plugin raises and would serve the full model: so a plan that cannot run ends
the process, with one line that says why.
"""

from __future__ import annotations


def activate() -> None:
    """Puts the plan of LEANMOE_PLAN to work in this process, or ends it."""
    try:
        from leanmoe.serve.plugin_options import PluginOptions

        options = PluginOptions.from_environ("SGLang")
        if options is None:
            return
        from leanmoe.serve.sglang.patch import start

        start(options.load_plan("SGLang"), options.path)
    except Exception as error:
        raise SystemExit(f"leanmoe: {error}") from error
