"""vLLM, 0.24 and newer, under a plan: switched on by LEANMOE_PLAN=plan.json.

`plugin` is the entry point, `hook` finds the MoE layers, `routing` chooses their experts,
`router` reads how vLLM's own routers choose, `checks` refuse what cannot run, `padding` knows
which rows are no tokens, `statistics` say what ran.
"""
