"""What a plan gains: service load in process and against servers, full model and plans in turn."""
