"""SGLang 0.5.23 under a plan: switched on by LEANMOE_PLAN=plan.json.

`plugin` is the entry point, `patch` puts the plan around SGLang's `select_experts`. It was run in
that function on a CPU, in no SGLang server.
"""
