"""How long one forward step of a whole model takes on a deployment."""
