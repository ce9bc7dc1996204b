"""SGLang 0.5.23 under a plan: switched on by LEANMOE_PLAN=plan.json.

`plugin` is the entry point; `patch` puts the plan around SGLang's `select_experts`, and
`planned_model` checks the model that SGLang loads. `routing` is one call under a rule, `padding`
and `skipped_slots` are what SGLang does with rows and slots that are left out. `server_command`
starts a server. The hook ran in that function on a CPU, in no SGLang server on a GPU.
"""
