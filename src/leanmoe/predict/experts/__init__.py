"""How many experts a step activates, and how they spread over GPUs."""
