"""How the model that ships with leanmoe was trained and measured."""
