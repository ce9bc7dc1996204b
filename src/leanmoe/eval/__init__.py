"""What plans cost: on tasks, in replies, on kinds of text."""
