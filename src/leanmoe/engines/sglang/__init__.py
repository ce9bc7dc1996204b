"""SGLang 0.5.23 under a plan: switched on by LEANMOE_PLAN=plan.json.

`plugin` is the entry point, `hook` puts the plan around SGLang's `select_experts`. It was written
against SGLang's source and is tested against a stand-in of it: it has not run in SGLang.
"""
