"""What a plan gains: service load on the full model and on plans, interleaved."""
