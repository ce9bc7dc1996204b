"""Scripts about the repository itself: what a verb touches, the pages written from the code."""
