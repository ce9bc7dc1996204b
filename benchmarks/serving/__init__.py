"""Servers under load: how clients measure them."""
