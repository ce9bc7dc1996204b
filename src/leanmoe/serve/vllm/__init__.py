"""vLLM, 0.24 and newer, under a plan: switched on by LEANMOE_PLAN=plan.json.

`plugin` is the entry point, `hook` finds the MoE layers, `routing` chooses their experts,
`router` reads how vLLM's own routers choose, `skipping` says how a skipped slot is written,
`experts` puts leanmoe's kernels in the place of vLLM's, `checks` refuse what cannot run, `padding`
knows which rows are no tokens, `statistics` say what ran.
"""
