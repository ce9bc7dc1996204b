"""How far the planner is off, and where its constants come from."""
