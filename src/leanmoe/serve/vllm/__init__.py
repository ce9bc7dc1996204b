"""vLLM, 0.24 and newer, under a plan: switched on by LEANMOE_PLAN=plan.json.

`plugin` is the entry point. `patch` finds the models that vLLM builds, and `planned_model` puts the
plan in the place of their MoE layers' routing, which `layer_routing` then does. `checks` reads
what vLLM says of a layer, and refuses what cannot run; `small_steps` says how a skipped slot is
written, `rule_rows` which rows are a prompt's, `skipped_slots` has experts that compute nothing for
skipped slots. `launch` builds the server's command, `plan_metrics` says in /metrics what ran.
"""
